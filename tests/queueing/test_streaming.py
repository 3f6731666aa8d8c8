"""A consumer's stream over a broker whose disk is slow."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.resources import Topic
from services.queueing.streaming import Batch, Consumer, FlowControl, gather
from services.runtime.errors import UnavailableError
from tests.contracts.broker_steps import arriving, bodies, publish, subscribe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    from services.queueing.domain import Refusal

pytestmark = pytest.mark.timeout(120)


class SlowBroker(SqliteBroker):
    """Acknowledges when it may, or fails when it may."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.may = asyncio.Event()
        self.fails = False
        self.acknowledged: list[Sequence[str]] = []

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        self.acknowledged.append(ack_ids)
        await self.may.wait()
        if self.fails:
            raise UnavailableError("the disk is away", reason="DISK_AWAY")
        return await super().acknowledge(subscription, ack_ids)


@dataclass(frozen=True)
class Said:
    """Instructions of a consumer."""

    acknowledge: Sequence[str] = ()
    refusals: Sequence[Refusal] = ()
    extensions: Sequence[tuple[str, float]] = ()
    drain: bool = False


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[SlowBroker]:
    async with SlowBroker(tmp_path / "queue.sqlite") as opened:
        await opened.create_topic(Topic("jobs"))
        await subscribe(opened)
        await publish(opened, "a", "b")
        yield opened


def _stream(broker: SlowBroker, said: asyncio.Queue[Said | None]) -> aclosing[AsyncGenerator[Batch]]:
    async def instructions() -> AsyncIterator[Said]:
        while (words := await said.get()) is not None:
            yield words

    consumer = Consumer(broker, "work", FlowControl(messages=1))
    return aclosing(cast("AsyncGenerator[Batch]", consumer.run(instructions())))


async def test_the_next_message_comes_while_the_last_ones_acknowledgement_is_made_durable(
    broker: SlowBroker,
) -> None:
    said: asyncio.Queue[Said | None] = asyncio.Queue()
    async with asyncio.timeout(60), _stream(broker, said) as batches:
        first = await anext(batches)
        said.put_nowait(Said([first.deliveries[0].ack_id]))
        second = await anext(batches)
        assert bodies([*first.deliveries, *second.deliveries]) == ["a", "b"]
        assert (await broker.stats("work")).leased == 2  # the first one still is
        broker.may.set()
        while (await broker.stats("work")).leased != 1:  # noqa: ASYNC110 - polls a broker
            await asyncio.sleep(0.01)


async def test_what_could_not_be_settled_is_free_when_the_stream_has_failed(broker: SlowBroker) -> None:
    broker.fails = True
    broker.may.set()
    said: asyncio.Queue[Said | None] = asyncio.Queue()

    async def consume() -> None:
        async with _stream(broker, said) as batches:
            async for batch in batches:
                said.put_nowait(Said([delivery.ack_id for delivery in batch.deliveries]))

    async with asyncio.timeout(60):
        with pytest.raises(UnavailableError):
            await consume()
    assert sorted(await arriving(broker, count=2)) == ["a", "b"]


async def test_what_is_acknowledged_meanwhile_is_made_durable_together_and_before_the_end(
    broker: SlowBroker,
) -> None:
    await publish(broker, "c", "d")
    said: asyncio.Queue[Said | None] = asyncio.Queue()
    async with asyncio.timeout(60), _stream(broker, said) as batches:
        ids = []
        for _ in range(4):
            ids.append((await anext(batches)).deliveries[0].ack_id)
            said.put_nowait(Said([ids[-1]]))
        said.put_nowait(Said(extensions=[(ids[3], 0.0)]))  # behind its acknowledgement: it has ended
        said.put_nowait(Said(["unknown"]))
        said.put_nowait(None)
        while not said.empty():  # noqa: ASYNC110 - polls a stream
            await asyncio.sleep(0.01)
        broker.may.set()
        expired = [ack_id async for batch in batches for ack_id in batch.expired]
    assert broker.acknowledged == [ids[:1], ids[1:], ["unknown"]]
    assert expired == [ids[3], "unknown"]
    stats = await broker.stats("work")
    assert (stats.ready, stats.leased) == (0, 0)


async def _waits(handed_out: int, held: int, *, filled: bool) -> bool:
    """Whether there is a pause after a batch of a consumer that may hold ten."""
    pause = gather(handed_out, range(held), 10, asyncio.Event(), filled=filled)
    try:
        pause.send(None)
    except StopIteration:
        return False
    with suppress(asyncio.CancelledError):
        pause.throw(asyncio.CancelledError())
    return True


@pytest.mark.parametrize(
    ("held", "filled", "waits"),
    [(3, False, True), (10, True, True), (6, True, True), (5, True, False), (0, True, False)],
)
async def test_a_pause_lets_messages_gather_or_room_until_half_of_it_is_free(
    held: int, filled: bool, waits: bool
) -> None:
    assert await _waits(1000, held, filled=filled) == waits
