"""Google Pub/Sub's official client for Go, with only PUBSUB_EMULATOR_HOST set, on either backend."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from services.queueing.backends.sqlite import SqliteBroker
from tests.ports import free_port
from tests.queueing.pubsub_clients import Server, serving
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)
ANSWER_S = 240.0
SCENARIOS = (
    *("ordering", "redelivery", "dead-letter", "filter", "large", "in-flight", "resume"),
    *("seek", "snapshot", "settings", "detach", "cancel"),
)


@pytest.fixture(params=["sqlite", "rabbitmq"])
def make_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Opens the same broker each time."""
    if request.param == "sqlite":
        return lambda: SqliteBroker(tmp_path / "queue.sqlite")
    rabbitmq = request.getfixturevalue("rabbitmq")
    url = rabbitmq.url(request.getfixturevalue("rabbitmq_vhost"))
    return lambda: rabbit_broker(url, tmp_path / "state.sqlite")


@asynccontextmanager
async def running(program: Path, address: str, *scenarios: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        program,
        *scenarios,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PUBSUB_EMULATOR_HOST": address},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process) -> tuple[str, str]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), ANSWER_S)
    told: dict[str, str] = json.loads(line)
    return told["scenario"], told["error"]


async def test_the_scenarios_of_a_program_that_knows_nothing_of_plexus(
    make_broker: Callable[[], Any], pubsub_program: Path
) -> None:
    with serving(Server(make_broker)) as server:
        address = await asyncio.to_thread(server.address)
        async with running(pubsub_program, address, *SCENARIOS) as process:
            found = [await said(process) for _ in SCENARIOS]
    assert found == [(scenario, "") for scenario in SCENARIOS]


async def test_a_subscriber_and_a_publisher_go_on_over_a_restart(
    make_broker: Callable[[], Any], pubsub_program: Path
) -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        with serving(Server(make_broker, port)) as first:
            address = await asyncio.to_thread(first.address)
            process = await stack.enter_async_context(running(pubsub_program, address, "restart"))
            assert await said(process) == ("restart", "now")
        with serving(Server(make_broker, port)) as second:
            await asyncio.to_thread(second.address)
            process.send_signal(signal.SIGUSR1)
            assert await said(process) == ("restart", "")
