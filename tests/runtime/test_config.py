"""Configuration: precedence, sources, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from services.cli.explain import section_models
from services.runtime.config import Section, ServerConfig, Settings
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path


class Inner(Section):
    size_bytes: int = 1


class Sample(Section):
    password: SecretStr | None = None
    inner: Inner = Inner()


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "plexus.yaml"
    file.write_text("server: {drain_s: 3, max_concurrent_calls: 7}")
    settings = Settings({"PLEXUS_SERVER__DRAIN_S": "4"}, file)
    config = settings.section("server", ServerConfig)
    assert (config.drain_s, config.max_concurrent_calls, config.reflection) == (4.0, 7, False)
    sources = {row.key: row.source for row in settings.explain("server", ServerConfig)}
    assert sources["server.drain_s"] == "PLEXUS_SERVER__DRAIN_S"
    assert sources["server.max_concurrent_calls"] == str(file)
    assert sources["server.reflection"] == "default"


def test_nested_keys_and_secrets_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    settings = Settings(
        {"PLEXUS_VECTORS__PASSWORD_FILE": str(secret), "PLEXUS_VECTORS__INNER__SIZE_BYTES": "9"}
    )
    config = settings.section("vectors", Sample)
    assert config.password is not None
    assert config.password.get_secret_value() == "hunter2"
    assert config.inner.size_bytes == 9
    assert "hunter2" not in str(settings.explain("vectors", Sample))


@pytest.mark.parametrize(
    ("environment", "content", "named"),
    [
        ({"PLEXUS_SEVER__DRAIN_S": "1"}, "", "PLEXUS_SEVER__DRAIN_S"),
        ({}, "sever: {}", "sever"),
        ({"PLEXUS_SERVER__DRAIN": "1"}, "", "PLEXUS_SERVER__DRAIN"),
        ({"PLEXUS_SERVER__DRAIN_S": "soon"}, "", "PLEXUS_SERVER__DRAIN_S"),
        ({}, "server: [1]", "server"),
        ({}, "server: {a: [", "plexus.yaml"),
        ({"PLEXUS_SERVER__DRAIN_S_FILE": "/does/not/exist"}, "", "PLEXUS_SERVER__DRAIN_S_FILE"),
    ],
)
def test_what_nobody_reads_or_understands_is_refused_by_name(
    tmp_path: Path, environment: dict[str, str], content: str, named: str
) -> None:
    file = tmp_path / "plexus.yaml"
    file.write_text(content)
    with pytest.raises(InvalidArgumentError, match=named):
        Settings(environment, file).section("server", ServerConfig)


def test_no_key_ends_like_the_variables_that_name_a_file() -> None:
    # PLEXUS_GATEWAY__KONG_FILE would set gateway.kong to the file's content, not gateway.kong_file.
    keys = [f"{name}.{key}" for name, model in section_models().items() for key in model.model_fields]
    assert len(keys) > 40
    assert [key for key in keys if key.endswith("_file")] == []
