"""Fixtures of the queueing service's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.queueing.state import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.servers.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a test keeps its state; each such test runs on both kinds of database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state.sqlite"
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    with postgres.database() as url:
        yield url


@pytest.fixture
async def state(state_url: str) -> AsyncIterator[Database]:
    """An empty database of the state; each such test runs on both kinds."""
    async with Database(state_url) as database:
        yield database
