"""The Compose file and its secrets, made as an operator makes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.production.compose import Project, load
from tests.servers.programs import COMPOSEFILE, require
from tools import compose_secrets

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def composefile_program() -> Path:
    """Compose's loader."""
    return require(COMPOSEFILE)


@pytest.fixture(scope="session")
def project(composefile_program: Path) -> Project:
    """docker-compose.yml."""
    return load(composefile_program)


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of secrets, ours."""
    folder = tmp_path_factory.mktemp("production") / "secrets"
    compose_secrets.make(folder, (os.getuid(), os.getgid()))
    return folder
