"""The whole backend, started as a user would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.cli.supervisor.backend import SERVICES
from tests.e2e.backend import REPOSITORY, Backend, fetched_models, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    for name in SERVICES:
        if not (REPOSITORY / "services" / name / "main.py").exists():
            pytest.skip(f"services/{name} does not exist yet")
    made = Backend(tmp_path_factory.mktemp("state"), free_port())
    models = fetched_models()
    if models is not None:
        (made.state / "models").symlink_to(models, target_is_directory=True)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def models() -> Path:
    found = fetched_models()
    if found is None:
        pytest.skip("needs the models: run `make demo` once, or set PLEXUS_TEST_MODELS")
    return found
