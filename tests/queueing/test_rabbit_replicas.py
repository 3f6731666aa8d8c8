"""Two replicas of the broker on one RabbitMQ and one PostgreSQL; their deaths are in test_replicas_killed."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message, Refusal
from services.queueing.kept import Position, Redrive, Where
from services.queueing.resources import Subscription, Topic
from services.runtime.errors import FailedPreconditionError, NotFoundError
from tests.contracts.broker_steps import AT_ONCE, bodies, dead, publish, pull, settled, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.queueing.backends.rabbit import RabbitBroker
    from services.queueing.domain import Delivery
    from tests.servers.postgres import PostgresServer
    from tests.servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.timeout(400)
PATIENCE_S = 120.0

Two = tuple["RabbitBroker", "RabbitBroker"]


@pytest.fixture
async def two(rabbitmq: RabbitServer, rabbitmq_vhost: str, postgres: PostgresServer) -> AsyncIterator[Two]:
    """Replicas that know of each other."""
    async with AsyncExitStack() as stack:
        database = stack.enter_context(postgres.database())
        url = rabbitmq.url(rabbitmq_vhost)
        first = await stack.enter_async_context(rabbit_broker(url, database))
        second = await stack.enter_async_context(rabbit_broker(url, database))
        await first.create_topic(Topic("jobs"))
        async with asyncio.timeout(PATIENCE_S):
            while not (first._consuming._others and second._consuming._others):  # noqa: ASYNC110 - polls the two
                await asyncio.sleep(0.02)
        yield first, second


async def drained(brokers: Two, count: int, name: str = "work") -> list[Delivery]:
    """So many deliveries from either replica, acknowledged at the other one."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            for puller, settler in (brokers, brokers[::-1]):
                deliveries = await pull(puller, name, wait_s=0.05)
                assert await settler.acknowledge(name, [delivery.ack_id for delivery in deliveries]) == []
                found += deliveries
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - polls a replica
            await asyncio.sleep(0.02)


async def test_who_publishes_what_a_dead_replica_began_does_not_wait_for_its_time(
    rabbitmq: RabbitServer, rabbitmq_vhost: str, postgres: PostgresServer
) -> None:
    """It would be ten minutes; as when it dies, its connection ends and nothing is heard of it."""
    with postgres.database() as database:
        url = rabbitmq.url(rabbitmq_vhost)
        async with rabbit_broker(url, database, publish_deadline_s=600) as second:
            topic = await second.create_topic(Topic("jobs"))
            await subscribe(second)
            async with rabbit_broker(url, database, publish_deadline_s=600) as first:
                await until(lambda: first._consuming.own)
                message = Message(b"a", dedup_id="same")
                await first._state.reserve(topic, [(message, "begun")])
                await first._receiving.close()
                async with asyncio.timeout(PATIENCE_S):
                    assert await second.publish("jobs", [message]) == ["begun"]
            assert bodies(await pull(second, wait_s=60)) == ["a"]


async def test_what_one_creates_or_deletes_the_other_knows(two: Two) -> None:
    first, second = two
    await publish(first, "nobody hears")  # the first knows the topic now, and that it has no subscriptions
    await subscribe(second)
    await publish(first, "a")
    await publish(first, "b", delay_s=0.01)
    assert sorted(bodies(await drained(two, 2))) == ["a", "b"]
    await pull(first)
    await second.delete_subscription("work")
    with pytest.raises(NotFoundError):
        await first.get_subscription("work")
    with pytest.raises(NotFoundError):
        await pull(first, wait_s=30)
    await until(lambda: "work" not in first._consuming._windows)


async def test_settings_changed_at_one_hold_at_the_other(two: Two) -> None:
    first, second = two
    work = await subscribe(first)
    await pull(second)
    await first.update_subscription(replace(work, ack_deadline_s=77))
    await until(lambda: second._consuming._windows["work"].subscription.ack_deadline_s == 77)
    await second.update_subscription(replace(work, detached=True))
    with pytest.raises(FailedPreconditionError):
        await pull(first, wait_s=30)


async def test_a_message_is_settled_at_either(two: Two) -> None:
    first, second = two
    await subscribe(first)
    await publish(first, "a", "b", "c")
    held = await pull(first, wait_s=30)
    while len(held) < 3:
        held += await pull(second, wait_s=1)
    ids = [delivery.ack_id for delivery in held]
    assert await second.extend("work", [(ack_id, 600.0) for ack_id in ids]) == []
    assert await second.acknowledge("work", ids[:1]) == []
    assert await first.nack("work", [Refusal(ids[1], "bad", dead=True)]) == []
    assert await second.extend("work", [(ids[2], 0.0)]) == []  # it is free again
    assert await second.acknowledge("work", ["invented", f"{'0' * 16}.gone"]) == [
        "invented",
        f"{'0' * 16}.gone",
    ]
    (letter,) = await dead(second, count=1)
    assert letter.reason == "bad"
    assert bodies(await drained(two, 1)) == [held[2].data.decode()]


async def test_what_nobody_asks_one_for_is_had_from_the_other(two: Two) -> None:
    first, second = two
    await subscribe(first)
    await publish(first, *map(str, range(50)))
    (held,) = await pull(first, count=1, wait_s=30)  # and the rest is in its window
    found: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < 49:
            deliveries = await pull(second, wait_s=5)
            await second.acknowledge("work", [delivery.ack_id for delivery in deliveries])
            found += bodies(deliveries)
    assert sorted([*found, held.data.decode()], key=int) == [str(number) for number in range(50)]
    assert await second.acknowledge("work", [held.ack_id]) == []
    await publish(second, "again")
    assert bodies(await drained(two, 1)) == ["again"]


async def test_a_delayed_message_comes_from_one_of_them(two: Two) -> None:
    await subscribe(two[0])
    for number in range(30):
        await publish(two[number % 2], str(number), delay_s=0.3)
    found = await drained(two, 30)
    assert Counter(bodies(found)) == {str(number): 1 for number in range(30)}
    assert await settled(two[0], ready=0)


async def test_the_same_published_at_both_at_once_is_one_message(two: Two) -> None:
    await subscribe(two[0])
    ids = await asyncio.gather(
        *(publish(two[number % 2], "a", dedup_id=f"id-{number // 6}") for number in range(30))
    )
    assert len({message_id for (message_id,) in ids}) == 5
    assert len(await drained(two, 5)) == 5
    assert await settled(two[0], ready=0)


async def test_an_ordered_subscription_keeps_its_order_whoever_is_asked(two: Two) -> None:
    await subscribe(two[0], ordered=True)
    for number in range(60):
        await two[number % 2].publish(
            "jobs", [Message(str(number).encode(), ordering_key=f"key-{number % 4}")]
        )
    seen: dict[str, list[int]] = defaultdict(list)
    nacked: set[int] = set()
    async with asyncio.timeout(PATIENCE_S):
        while sum(map(len, seen.values())) < 60:
            for puller, settler in (two, two[::-1]):
                for delivery in await pull(puller, count=3, wait_s=0.05):
                    number = int(delivery.data)
                    if number % 7 == 0 and number not in nacked:
                        nacked.add(number)
                        assert await settler.nack("work", [Refusal(delivery.ack_id, delay_s=0)]) == []
                        continue
                    seen[delivery.message.ordering_key].append(number)
                    assert await settler.acknowledge("work", [delivery.ack_id]) == []
    assert all(numbers == sorted(numbers) for numbers in seen.values())
    assert len(nacked) == 9


async def test_an_ordered_subscription_goes_to_who_is_asked_when_the_other_is_not(two: Two) -> None:
    first, second = two
    await subscribe(first, ordered=True)
    await publish(first, "a", ordering_key="k")
    assert len(await drained((first, first), 1)) == 1
    await until(lambda: "work" not in first._consuming._windows)
    await publish(second, "b", ordering_key="k")
    assert len(await drained((second, second), 1)) == 1
    assert "work" in second._consuming._windows


async def test_who_has_lost_an_ordered_subscription_lets_go_of_it(two: Two) -> None:
    first, second = two
    await subscribe(first, ordered=True, ack_deadline_s=600)
    await publish(first, "a", "b", ordering_key="k")
    (held,) = await pull(first, wait_s=30)
    # As when its lease was not renewed in time.
    await second._consuming._claims.evict("ordered/work", first._consuming._peers.address)
    assert bodies(await drained((second, second), 2)) == ["a", "b"]
    assert await second.acknowledge("work", [held.ack_id]) == [held.ack_id]


async def test_an_exclusive_subscription_is_held_at_one_of_them(two: Two) -> None:
    first, second = two
    await first.create_subscription(Subscription("only", "jobs", exclusive=True))
    async with first.hold("only"):
        for other in two:
            with pytest.raises(FailedPreconditionError):
                await other.hold("only").__aenter__()
    async with second.hold("only"):
        pass


async def test_dead_letters_are_seen_redriven_and_purged_at_either(two: Two) -> None:
    first, second = two
    await subscribe(first)
    await publish(first, *map(str, range(6)))
    held: list[Delivery] = []
    while len(held) < 6:
        held += await pull(first, wait_s=1)
    await first.nack("work", [Refusal(delivery.ack_id, "bad", dead=True) for delivery in held])
    assert len(await dead(second, count=6)) == 6
    assert (await second.stats("work")).dead == 6
    moved = await asyncio.gather(*(broker.redrive("work", Where(), Redrive()) for broker in two))
    assert sum(moved) == 6
    assert sorted(bodies(await drained(two, 6))) == [str(number) for number in range(6)]
    assert await second.purge("work", Where()) == 0


async def test_a_dead_letter_topic_is_heard_at_either(two: Two) -> None:
    first, second = two
    await first.create_topic(Topic("graves"))
    await second.create_subscription(Subscription("mourner", "graves"))
    await subscribe(first, dead_letter_topic="graves", retry=replace(AT_ONCE, max_attempts=1))
    await publish(first, "a")
    (held,) = await drained_unsettled(two)
    await second.nack("work", [Refusal(held.ack_id, "bad")])
    assert bodies(await drained(two, 1, "mourner")) == ["a"]


async def drained_unsettled(brokers: Two) -> list[Delivery]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for broker in brokers:
                if deliveries := await pull(broker, wait_s=0.05):
                    return deliveries


async def test_stats_count_what_either_holds(two: Two) -> None:
    await subscribe(two[0])
    await publish(two[0], *map(str, range(4)))
    await publish(two[1], "later", delay_s=3600)
    held = await drained_unsettled(two)
    async with asyncio.timeout(PATIENCE_S):
        while (await two[1].stats("work")).leased != len(held):  # noqa: ASYNC110 - polls the replicas
            await asyncio.sleep(0.02)
    for broker in two:
        stats = await broker.stats("work")
        assert (stats.ready + stats.leased, stats.delayed) == (4, 1)


async def test_a_seek_clears_what_either_holds(two: Two) -> None:
    first, second = two
    await first.create_topic(Topic("audit", log=True))
    await first.create_subscription(Subscription("reader", "audit"))
    await first.publish("audit", [Message(str(number).encode()) for number in range(5)])
    first_seen = await pull(first, "reader", wait_s=30)

    await second.seek("reader", Position(sequence=0))
    ids = [delivery.ack_id for delivery in first_seen]
    assert await second.acknowledge("reader", ids) == ids
    found = await drained(two, 5, "reader")
    assert sorted(bodies(found)) == [str(number) for number in range(5)]


async def test_what_the_other_consumes_in_order_cannot_be_in_a_snapshot(two: Two) -> None:
    first, second = two
    await subscribe(first, ordered=True)
    await publish(first, "a", "b", ordering_key="k")
    (held,) = await pull(first, wait_s=30)
    with pytest.raises(FailedPreconditionError) as caught:
        await second.create_snapshot("now", "work", {})
    assert caught.value.reason == "SUBSCRIPTION_IN_USE"
    assert await second.acknowledge("work", [held.ack_id]) == []
    await first.create_snapshot("now", "work", {})  # nothing of the other attempt is in the way
    assert bodies(await drained(two, 1)) == ["b"]
    await second.seek("work", Position(snapshot="now"))
    assert bodies(await drained(two, 1)) == ["b"]
