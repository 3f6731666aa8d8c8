"""The whole backend, started as a user would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.backend import Backend
from tests.models import model_folder
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    made = Backend(tmp_path_factory.mktemp("state"), free_port())
    (made.state / "models").symlink_to(model_folder(), target_is_directory=True)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def models() -> Path:
    return model_folder()
