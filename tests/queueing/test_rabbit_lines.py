"""Ordering keys with more to do than the window has room for, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message, Refusal
from services.queueing.kept import Position
from services.queueing.resources import Backoff, RetryPolicy, Topic
from tests.contracts.broker_steps import bodies, dead, pull, settled, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from services.queueing.backends.rabbit import RabbitBroker
    from tests.servers.rabbitmq import RabbitServer

    Opener = Callable[[], AbstractAsyncContextManager[RabbitBroker]]

pytestmark = pytest.mark.timeout(400)
PATIENCE_S = 120.0
FOR_EVER = RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=1000)


@pytest.fixture
def opener(rabbitmq: RabbitServer, rabbitmq_vhost: str, state_url: str) -> Opener:
    """Opens the same broker each time, with a window for 40 messages of an ordered subscription."""
    return lambda: rabbit_broker(rabbitmq.url(rabbitmq_vhost), state_url, ordered_window=40)


@pytest.fixture
async def broker(opener: Opener) -> AsyncIterator[RabbitBroker]:
    async with opener() as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker, ordered=True, ack_deadline_s=600, retry=FOR_EVER)
        yield broker


async def publish_to(broker: RabbitBroker, key: str, numbers: range) -> None:
    await broker.publish("jobs", [Message(b"%d" % number, ordering_key=key) for number in numbers])


async def flows(broker: RabbitBroker, key: str) -> None:
    """A message of this key comes past those that are held, and is acknowledged."""
    async with asyncio.timeout(PATIENCE_S):
        deliveries = await pull(broker, count=1, wait_s=60)
    assert [delivery.message.ordering_key for delivery in deliveries] == [key]
    assert await broker.acknowledge("work", [deliveries[0].ack_id]) == []


async def blocked(broker: RabbitBroker) -> str:
    """A hot key has 200 messages, the first of which is with a consumer; whose lease is returned."""
    await publish_to(broker, "hot", range(200))
    await publish_to(broker, "cold", range(1))
    (held,) = await pull(broker, count=1, wait_s=30)
    assert held.data == b"0"
    await flows(broker, "cold")
    return held.ack_id


async def cut(broker: RabbitBroker) -> None:
    """Close the window's channel, as a fault does."""
    window = broker._consuming._windows["work"]
    if window._intake._channel is not None:
        await window._intake._channel.close()


async def filled(broker: RabbitBroker) -> None:
    """Wait with all that can be had in our hands until lines have moved to the state, and return it."""
    held: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            held += [delivery.ack_id for delivery in await pull(broker, wait_s=0.1)]
            if broker._consuming._windows["work"]._session.holding.parked:
                break
    await broker.extend("work", [(ack_id, 0) for ack_id in held])


async def test_order_holds_while_lines_move_consumers_fail_and_channels_break(broker: RabbitBroker) -> None:
    keys, each = ("a", "b", "c"), 150
    for key in keys:
        await publish_to(broker, key, range(each))
    await filled(broker)
    choice = random.Random(7)
    done: dict[str, set[int]] = defaultdict(set)
    async with asyncio.timeout(PATIENCE_S):
        while sum(map(len, done.values())) < len(keys) * each:
            for delivery in await pull(broker, count=3, wait_s=1):
                key, number, fate = delivery.message.ordering_key, int(delivery.data), choice.random()
                assert number <= len(done[key])  # nothing before it is missing
                if fate < 0.1:
                    await broker.nack("work", [Refusal(delivery.ack_id, "by chance")])
                elif fate < 0.15:
                    await broker.extend("work", [(delivery.ack_id, 0)])
                elif fate < 0.16:
                    await cut(broker)
                elif not await broker.acknowledge("work", [delivery.ack_id]):
                    done[key].add(number)
    assert done == {key: set(range(each)) for key in keys}
    assert await settled(broker, ready=0)


async def test_a_line_outlives_its_broker_and_comes_in_order(broker: RabbitBroker, opener: Opener) -> None:
    await blocked(broker)
    await publish_to(broker, "hot", range(200, 220))
    assert await settled(broker, ready=219)
    await broker._consuming.drop("work")
    async with opener() as other:
        for number in range(220):
            (delivery,) = await pull(other, count=1, wait_s=30)
            assert delivery.data == b"%d" % number
            assert await other.acknowledge("work", [delivery.ack_id]) == []
        assert (await other.stats("work")).ready == 0


async def test_a_failed_message_of_a_line_is_dead_once_and_the_next_one_comes(broker: RabbitBroker) -> None:
    held = await blocked(broker)
    await broker.nack("work", [Refusal(held, "bad", dead=True)])
    assert bodies(await pull(broker, wait_s=30)) == ["1"]
    await broker._consuming.drop("work")
    assert bodies(await pull(broker, wait_s=30)) == ["1"]
    assert (await broker.dead_letter_stats("work")).total == 1


@pytest.mark.parametrize("how", ["sought", "deleted"])
async def test_a_line_goes_with_what_the_subscription_holds(broker: RabbitBroker, how: str) -> None:
    held = await blocked(broker)
    if how == "sought":
        await broker.seek("work", Position(time=4e9))
    else:
        await broker.delete_subscription("work")
        await subscribe(broker, ordered=True)
    assert await broker.acknowledge("work", [held]) == [held]
    await publish_to(broker, "hot", range(1000, 1001))
    assert bodies(await pull(broker, wait_s=30)) == ["1000"]
    await broker._consuming.drop("work")
    assert bodies(await pull(broker, wait_s=30)) == ["1000"]


async def still(broker: RabbitBroker, count: int) -> dict[str, str]:
    """So many keys stand still, with two messages each; leases of the first ones."""
    for number in range(2):
        for start in range(0, count, 100):
            keys = range(start, start + 100)
            await broker.publish("jobs", [Message(b"%d" % number, ordering_key=f"{key}") for key in keys])
    held: dict[str, str] = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(held) < count:
            deliveries = await pull(broker, wait_s=30)
            held.update({delivery.message.ordering_key: delivery.ack_id for delivery in deliveries})
    return held


async def test_keys_that_stand_still_outlive_their_broker_each_in_order(
    broker: RabbitBroker, opener: Opener
) -> None:
    count = 300
    held = await still(broker, count)
    assert (await broker.stats("work")).set_aside >= count - 40
    some = sorted(held)[: count // 2]
    assert await broker.acknowledge("work", [held[key] for key in some]) == []
    await broker._consuming.drop("work")
    done: dict[str, list[bytes]] = defaultdict(list)
    async with opener() as other, asyncio.timeout(PATIENCE_S):
        while sum(map(len, done.values())) < 2 * count - len(some):
            for delivery in await pull(other, wait_s=30):
                done[delivery.message.ordering_key].append(delivery.data)
                assert await other.acknowledge("work", [delivery.ack_id]) == []
        stats = await other.stats("work")
        assert (stats.ready, stats.leased, stats.set_aside) == (0, 0, 0)
    assert done == {key: [b"1"] if key in some else [b"0", b"1"] for key in held}


async def test_lines_that_seek_has_passed_over_are_not_counted(broker: RabbitBroker) -> None:
    held = await still(broker, 100)
    await broker.seek("work", Position(time=time.time()))
    assert await settled(broker, ready=0)
    assert (await broker.stats("work")).unexamined == 0
    async with asyncio.timeout(PATIENCE_S):
        while (await broker.stats("work")).set_aside:  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.02)
    assert len(await broker.acknowledge("work", list(held.values()))) == 100
    await publish_to(broker, "0", range(7, 8))
    assert bodies(await pull(broker, wait_s=30)) == ["7"]


async def test_a_message_set_aside_that_dies_is_whole(broker: RabbitBroker) -> None:
    held = await still(broker, 100)
    key = min(held)
    await broker.nack("work", [Refusal(held[key], "bad", dead=True)])
    (letter,) = await dead(broker, count=1)
    assert (letter.message.data, letter.message.ordering_key) == (b"0", key)
    (delivery,) = await pull(broker, wait_s=30)
    assert (delivery.message.ordering_key, delivery.data) == (key, b"1")


async def test_more_than_may_be_set_aside_waits_and_is_told(
    rabbitmq: RabbitServer, rabbitmq_vhost: str, tmp_path: Path
) -> None:
    url = rabbitmq.url(rabbitmq_vhost)
    async with rabbit_broker(url, tmp_path / "few", ordered_window=40, max_set_aside=50) as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker, ordered=True, ack_deadline_s=600)
        held = list((await still(broker, 20)).values())
        for key in range(200):
            await publish_to(broker, f"more{key}", range(1))
        async with asyncio.timeout(PATIENCE_S):
            while (stats := await broker.stats("work")).set_aside < 50:
                held += [delivery.ack_id for delivery in await pull(broker, wait_s=0.1)]
        assert stats.set_aside == 50
        assert await broker.acknowledge("work", held) == []
        async with asyncio.timeout(PATIENCE_S):
            while (await broker.stats("work")).ready:
                for delivery in await pull(broker, wait_s=0.1):
                    await broker.acknowledge("work", [delivery.ack_id])


async def test_a_snapshot_has_the_line_in_order(broker: RabbitBroker) -> None:
    await blocked(broker)
    await broker.create_snapshot("kept", "work", {})
    await broker.seek("work", Position(snapshot="kept"))
    for number in range(200):
        (delivery,) = await pull(broker, count=1, wait_s=30)
        assert delivery.data == b"%d" % number
        await broker.acknowledge("work", [delivery.ack_id])
