"""Fixtures of the queueing service's tests: clients of Pub/Sub on either backend, databases for the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.state import Database
from tests.queueing.pubsub_clients import Clients, Server, pubsub_clients, serving
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.servers.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "rabbitmq"])
def make_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Opens the same broker each time."""
    if request.param == "sqlite":
        return lambda: SqliteBroker(tmp_path / "queue.sqlite")
    rabbitmq = request.getfixturevalue("rabbitmq")
    url = rabbitmq.url(request.getfixturevalue("rabbitmq_vhost"))
    return lambda: rabbit_broker(url, tmp_path / "state.sqlite")


@pytest.fixture
def pubsub_server(make_broker: Callable[[], Any]) -> Iterator[Server]:
    """Serves Pub/Sub's clients."""
    with serving(Server(make_broker)) as server:
        yield server


@pytest.fixture
def clients(pubsub_server: Server) -> Iterator[Clients]:
    """With only PUBSUB_EMULATOR_HOST set, and a topic `jobs`."""
    with pubsub_clients(pubsub_server.address()) as clients:
        yield clients


@pytest.fixture
def sqlite_clients(tmp_path: Path) -> Iterator[Clients]:
    """For what is the same on either backend."""
    with (
        serving(Server(lambda: SqliteBroker(tmp_path / "queue.sqlite"))) as server,
        pubsub_clients(server.address()) as clients,
    ):
        yield clients


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
