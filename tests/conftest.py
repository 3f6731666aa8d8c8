"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
import pytest

from services.runtime.access import AllowAll, Authorizer
from services.runtime.config import ServerConfig
from services.runtime.pipeline import Pipeline
from services.runtime.service import server_options
from tests.servers.postgres import PostgresServer
from tests.servers.programs import PROGRAMS, UnavailableServerError, require
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long: one that came last would keep a single worker busy at the end."""
    markers = ("e2e", "slow")
    long = {item.path for item in items if any(map(item.get_closest_marker, markers))}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the servers that the chosen tests run: a build takes minutes, which no test's timeout allows."""
    wanted = {
        name for item in session.items if isinstance(item, pytest.Function) for name in item.fixturenames
    }
    for program in PROGRAMS.values():
        if {program.name, f"{program.name}_program"} & wanted and not session.config.option.collectonly:
            # Left to the fixture, which skips or fails with the reason.
            with contextlib.suppress(UnavailableServerError):
                program.provide()


@pytest.fixture(scope="session")
def consul_program() -> Path:
    """The `consul` binary."""
    return require(PROGRAMS["consul"])


@pytest.fixture(scope="session")
def rabbitmq(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RabbitServer]:
    """RabbitMQ for the session: that of `PLEXUS_TEST_RABBITMQ_URL` (its management API), else ours."""
    url = os.environ.get("PLEXUS_TEST_RABBITMQ_URL")
    if url:
        yield RabbitServer.at(url)
        return
    program: Path = request.getfixturevalue("rabbitmq_program")
    with RabbitServer(program, tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def rabbitmq_vhost(rabbitmq: RabbitServer) -> Iterator[str]:
    """A virtual host of the session's RabbitMQ for one test."""
    with rabbitmq.vhost() as vhost:
        yield vhost


@pytest.fixture(scope="session")
def rabbitmq_program() -> Path:
    """Debian's `rabbitmq-server`."""
    return require(PROGRAMS["rabbitmq"])


@pytest.fixture(scope="session")
def postgres_program() -> Path:
    """Debian's `postgres`."""
    return require(PROGRAMS["postgres"])


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """PostgreSQL for the session: that of `PLEXUS_TEST_POSTGRES_URL`, else ours."""
    url = os.environ.get("PLEXUS_TEST_POSTGRES_URL")
    if url:
        yield PostgresServer.at(url)
        return
    program: Path = request.getfixturevalue("postgres_program")
    with PostgresServer(program) as server:
        yield server


@pytest.fixture(scope="session")
def toxiproxy_program() -> Path:
    """The `toxiproxy` server."""
    return require(PROGRAMS["toxiproxy"])


class Serve(Protocol):
    """Runs servicers behind the full interceptor chain on a free port, as `serve` below."""

    def __call__(
        self,
        add: Callable[[grpc.aio.Server], Any],
        *,
        peer: str = "cli",
        config: ServerConfig | None = None,
        authorizer: Authorizer | None = None,
        start: bool = True,
    ) -> AbstractAsyncContextManager[grpc.aio.Channel]: ...


@asynccontextmanager
async def _serve(
    add: Callable[[grpc.aio.Server], Any],
    *,
    peer: str = "cli",
    config: ServerConfig | None = None,
    authorizer: Authorizer | None = None,
    start: bool = True,
) -> AsyncIterator[grpc.aio.Channel]:
    config = config or ServerConfig()
    pipeline = Pipeline("test", config, authorizer or AllowAll(), trusted_peer=peer)
    unbounded = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(interceptors=[pipeline], options=server_options(config))
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    if start:  # else `add` keeps the server, and the test starts it once it is composed
        await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=unbounded) as channel:
            yield channel
    finally:
        await server.stop(grace=1)


@pytest.fixture
def serve() -> Serve:
    """`async with serve(add_servicers) as channel:`; the caller counts as the mesh service `peer`."""
    return _serve
