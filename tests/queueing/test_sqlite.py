"""The embedded broker: its contract, restarts and kills."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Subscription
from tests.contracts.broker import BrokerContract, bodies, publish, pull, subscribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class TestSqliteBroker(BrokerContract):
    @pytest.fixture
    async def broker(self, tmp_path: Path) -> AsyncIterator[SqliteBroker]:
        async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
            await broker.create_topic("jobs")
            yield broker


async def test_messages_leases_delays_and_dead_letters_survive_a_restart(tmp_path: Path) -> None:
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        await broker.create_topic("jobs")
        await subscribe(broker)
        await publish(broker, "leased", "waiting")
        (delivery,) = await pull(broker, count=1)
        await publish(broker, "delayed", delay_s=3600)
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        assert (await broker.stats("work")).delayed == 1
        assert bodies(await pull(broker)) == ["waiting"]
        assert await broker.acknowledge("work", [delivery.ack_id]) == []


_PRODUCER = """
import asyncio, sys
from pathlib import Path
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Message

async def main():
    async with SqliteBroker(Path(sys.argv[1])) as broker:
        async def produce(lane):
            number = 0
            while True:
                body = f"{lane}-{number}"
                await broker.publish("jobs", [Message(body.encode())])
                print(body, flush=True)
                number += 1
        await asyncio.gather(*(produce(lane) for lane in range(8)))

asyncio.run(main())
"""


async def test_no_acknowledged_message_is_lost_by_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    async with SqliteBroker(file) as broker:
        await broker.create_topic("jobs")
        await broker.create_subscription(Subscription("work", "jobs"))
    command = [sys.executable, "-c", _PRODUCER, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    confirmed = [process.stdout.readline().strip() for _ in range(300)]
    process.send_signal(signal.SIGKILL)
    confirmed += process.stdout.read().split("\n")[:-1]
    process.stdout.close()
    process.wait()
    async with SqliteBroker(file) as broker:
        stored: list[str] = []
        while found := await pull(broker, count=1000):
            stored += bodies(found)
    assert set(confirmed) <= set(stored)
    assert len(stored) == len(set(stored))
