"""Where a program finds its way into the mesh, and what it is told when there is none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import plexus.client

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRPC_XDS_BOOTSTRAP", "GRPC_XDS_BOOTSTRAP_CONFIG", "PLEXUS_STATE"):
        monkeypatch.setenv(name, "")  # so that what connect() sets is undone too


def bootstrap_of(state: Path) -> Path:
    path = state / "identities" / "cli" / "bootstrap.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    return path


async def test_the_state_folder_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bootstrap_of(tmp_path)
    monkeypatch.setenv("PLEXUS_STATE", str(tmp_path))
    async with plexus.client.connect():
        assert os.environ["GRPC_XDS_BOOTSTRAP"] == str(expected)


async def test_a_given_state_folder_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bootstrap_of(tmp_path / "given")
    bootstrap_of(tmp_path / "other")
    monkeypatch.setenv("PLEXUS_STATE", str(tmp_path / "other"))
    async with plexus.client.connect(tmp_path / "given"):
        assert os.environ["GRPC_XDS_BOOTSTRAP"] == str(expected)


async def test_without_any_setting_it_is_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    expected = bootstrap_of(tmp_path / "plexus")
    async with plexus.client.connect():
        assert os.environ["GRPC_XDS_BOOTSTRAP"] == str(expected)


async def test_a_process_that_has_joined_stays_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_XDS_BOOTSTRAP", "/elsewhere/bootstrap.json")
    async with plexus.client.connect():
        assert os.environ["GRPC_XDS_BOOTSTRAP"] == "/elsewhere/bootstrap.json"
    bootstrap_of(tmp_path)
    with pytest.raises(plexus.client.NotJoinedError, match="one state folder"):
        async with plexus.client.connect(tmp_path):
            pass


async def test_a_folder_that_nothing_has_run_on_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(plexus.client.NotJoinedError, match=f"{tmp_path}.*plexus up"):
        async with plexus.client.connect(tmp_path):
            pass
    assert not os.environ["GRPC_XDS_BOOTSTRAP"]


def test_everything_exported_exists() -> None:
    for name in plexus.client.__all__:
        assert getattr(plexus.client, name) is not None
    with pytest.raises(AttributeError):
        _ = plexus.client.nothing_of_this_name
