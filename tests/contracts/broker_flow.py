"""What every Broker does: order within a key, filters, patterns, priorities, times."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message, Refusal
from services.queueing.resources import Backoff, Priority, RetryPolicy, Subscription, Topic
from tests.contracts.broker_steps import (
    again_until_there,
    arriving,
    bodies,
    dead,
    publish,
    pull,
    settled,
    subscribe,
)

if TYPE_CHECKING:
    from services.queueing.domain import Broker


class FlowContract:
    """Which message comes to whom, and when.

    Attributes:
        too_many: Messages, more than the broker gives up at once.
    """

    too_many = 700

    async def test_an_ordered_subscription_hands_out_one_message_a_key_at_a_time(
        self, broker: Broker
    ) -> None:
        await subscribe(broker, ordered=True)
        for body in ("a1", "a2", "b1", "a3"):
            await publish(broker, body, ordering_key=body[0])
        first = await pull(broker)
        assert bodies(first) == ["a1", "b1"]
        await broker.acknowledge("work", [first[0].ack_id])
        (second,) = await pull(broker)
        assert (second.data, second.message.ordering_key) == (b"a2", "a")

    async def test_a_failed_message_keeps_its_place_in_its_key(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True)
        await publish(broker, "1", "2", ordering_key="k")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, delay_s=3)])
        assert await pull(broker) == []
        (again,) = await pull(broker, wait_s=30)
        assert (again.data, again.attempt) == (b"1", 2)

    async def test_a_dead_message_lets_the_next_of_its_key_come(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True)
        await publish(broker, "1", "2", ordering_key="k")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, dead=True)])
        assert bodies(await pull(broker, wait_s=10)) == ["2"]

    async def test_messages_without_key_are_not_ordered(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True)
        await publish(broker, "1", "2")
        assert bodies(await pull(broker)) == ["1", "2"]

    async def test_order_holds_while_consumers_fail_and_vanish(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True, retry=RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=1000))
        keys, each = 8, 25
        for number in range(each):
            await broker.publish(
                "jobs", [Message(b"%d" % number, ordering_key=f"k{key}") for key in range(keys)]
            )
        done: dict[str, list[int]] = {f"k{key}": [] for key in range(keys)}

        async def consume(seed: int) -> None:
            choice = random.Random(seed)
            while sum(map(len, done.values())) < keys * each:
                for delivery in await pull(broker, count=3, wait_s=0.2):
                    fate = choice.random()
                    if fate < 0.1:
                        await broker.nack("work", [Refusal(delivery.ack_id, "by chance")])
                    elif fate < 0.2:
                        await broker.extend("work", [(delivery.ack_id, 0)])
                    elif not await broker.acknowledge("work", [delivery.ack_id]):
                        done[delivery.message.ordering_key].append(int(delivery.data))

        async with asyncio.timeout(100):
            await asyncio.gather(*(consume(seed) for seed in range(4)))
        assert done == {key: list(range(each)) for key in done}

    async def test_a_key_with_much_to_do_keeps_no_other_waiting(self, broker: Broker) -> None:
        """One of its messages is with a consumer, 4,999 wait behind it, and the others' come after these."""
        await subscribe(broker, ordered=True, ack_deadline_s=600)
        hot, keys, each = 5000, 40, 5
        for start in range(0, hot, 1000):
            numbers = range(start, start + 1000)
            await broker.publish("jobs", [Message(b"%d" % n, ordering_key="hot") for n in numbers])
        (held,) = await pull(broker, wait_s=30)
        for number in range(each):
            await broker.publish("jobs", [Message(b"%d" % number, ordering_key=f"k{n}") for n in range(keys)])
        found: dict[str, list[int]] = {f"k{n}": [] for n in range(keys)}
        async with asyncio.timeout(100):
            while sum(map(len, found.values())) < keys * each:
                for delivery in await pull(broker, wait_s=10):
                    found[delivery.message.ordering_key].append(int(delivery.data))
                    await broker.acknowledge("work", [delivery.ack_id])
        assert found == {key: list(range(each)) for key in found}
        assert await settled(broker, ready=hot - 1)
        assert await broker.acknowledge("work", [held.ack_id]) == []
        for number in range(1, 200):
            (delivery,) = await pull(broker, wait_s=30)
            assert (delivery.data, delivery.attempt) == (b"%d" % number, 1)
            assert await broker.acknowledge("work", [delivery.ack_id]) == []

    async def test_keys_that_all_stand_still_stop_no_other(self, broker: Broker) -> None:
        """Half are with a consumer, half in a pause; then their consumers go on."""
        await subscribe(broker, ordered=True, ack_deadline_s=600)
        still = 1500
        for start in range(0, still, 500):
            keys = range(start, start + 500)
            await broker.publish("jobs", [Message(b"%d" % key, ordering_key=f"s{key}") for key in keys])
        held: dict[str, str] = {}
        async with asyncio.timeout(120):
            while len(held) < still:
                deliveries = await pull(broker, count=1000, wait_s=60)
                held.update({delivery.data.decode(): delivery.ack_id for delivery in deliveries})
                paused = [Refusal(d.ack_id, "later", delay_s=600) for d in deliveries if int(d.data) % 2]
                assert await broker.nack("work", paused) == []
            await publish(broker, "flows", ordering_key="other")
            (other,) = await pull(broker, wait_s=60)
        assert (other.data, await broker.acknowledge("work", [other.ack_id])) == (b"flows", [])
        stats = await broker.stats("work")
        assert (stats.ready, stats.leased, stats.delayed) == (0, still // 2, still // 2)
        await publish(broker, "next", ordering_key="s0")
        assert await broker.acknowledge("work", [held["0"]]) == []
        assert await broker.extend("work", [(held["2"], 0)]) == []
        again = await pull(broker, count=1, wait_s=60)
        again += await pull(broker, count=1, wait_s=60)
        assert sorted((d.data, d.message.ordering_key) for d in again) == [(b"2", "s2"), (b"next", "s0")]

    async def test_a_filter_lets_through_what_it_names(self, broker: Broker) -> None:
        await subscribe(broker, filter='attributes.kind = "a" OR hasPrefix(attributes.kind, "b")')
        for kind in ("a", "bc", "c"):
            await publish(broker, kind, attributes={"kind": kind})
        await publish(broker, "none")
        assert bodies(await pull(broker)) == ["a", "bc"]

    async def test_what_a_filter_keeps_away_is_not_counted(self, broker: Broker) -> None:
        await subscribe(broker, filter="attributes:wanted")
        for number in range(30):
            await publish(broker, str(number), attributes={"wanted": ""} if number % 3 == 0 else {})
        assert await settled(broker, ready=10)
        assert (await broker.stats("work")).unexamined == 0

    async def test_a_pattern_follows_topics_made_before_and_after_it(self, broker: Broker) -> None:
        await broker.create_topic(Topic("orders.eu.created"))
        await broker.create_subscription(Subscription("all", "orders.*.created"))
        await broker.create_topic(Topic("orders.us.created"))
        await broker.create_topic(Topic("orders.us.paid"))
        for topic in ("orders.eu.created", "orders.us.created", "orders.us.paid"):
            await broker.publish(topic, [Message(topic.encode())])
        found = await pull(broker, "all")
        assert [delivery.message.topic for delivery in found] == ["orders.eu.created", "orders.us.created"]

    async def test_higher_priorities_come_first_and_equal_ones_in_order(self, broker: Broker) -> None:
        await subscribe(broker)
        order = (Priority.LOW, Priority.NORMAL, Priority.CRITICAL, Priority.HIGH, Priority.CRITICAL)
        for number, priority in enumerate(order):
            await publish(broker, str(number), priority=priority)
        assert await settled(broker, ready=5)
        assert bodies(await pull(broker)) == ["2", "4", "3", "1", "0"]

    async def test_an_ordered_subscription_takes_no_priority_from_another(self, broker: Broker) -> None:
        await subscribe(broker, "a-first", ordered=True)
        await subscribe(broker)
        for number, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.CRITICAL)):
            await publish(broker, str(number), priority=priority)
        assert await settled(broker, ready=3)
        assert bodies(await pull(broker)) == ["2", "1", "0"]
        assert bodies(await pull(broker, "a-first", wait_s=30)) == ["0", "1", "2"]

    async def test_everything_said_of_a_message_arrives(self, broker: Broker) -> None:
        await subscribe(broker)
        hostile = {"k": "line\r\nbreak\0 ☃", "x-death": "[]", "content-type": "?"}
        await publish(
            broker,
            "a",
            attributes=hostile,
            ordering_key="key",
            priority=Priority.HIGH,
            correlation_id="job ☃ 7",
        )
        (delivery,) = await pull(broker)
        message = delivery.message
        assert (message.attributes, message.ordering_key, message.priority) == (hostile, "key", Priority.HIGH)
        assert (message.correlation_id, message.topic) == ("job ☃ 7", "jobs")

    async def test_a_message_that_waited_too_long_is_given_up(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "old", ttl_s=0.05)
        await publish(broker, "young", ttl_s=3600)
        (letter,) = await dead(broker, count=1)
        assert (letter.message.data, letter.reason) == (b"old", "expired")
        assert bodies(await pull(broker)) == ["young"]

    async def test_a_subscriptions_ttl_holds_for_messages_without_one(self, broker: Broker) -> None:
        await subscribe(broker, ttl_s=0.05)
        await publish(broker, "own", ttl_s=3600)
        await publish(broker, "subscription's")
        (letter,) = await dead(broker, count=1)
        assert letter.message.data == b"subscription's"
        assert bodies(await pull(broker)) == ["own"]

    async def test_none_of_many_that_waited_too_long_is_handed_out(self, broker: Broker) -> None:
        await subscribe(broker)
        await broker.publish("jobs", [Message(b"old", ttl_s=0.001) for _ in range(self.too_many)])
        await publish(broker, "young", ttl_s=3600)
        assert await arriving(broker, count=1) == ["young"]
        assert {letter.reason for letter in await dead(broker, count=1)} == {"expired"}

    async def test_the_ttl_of_a_delayed_message_begins_when_it_is_due(self, broker: Broker) -> None:
        await subscribe(broker, ttl_s=0.5)

        async def later() -> None:
            await publish(broker, "later", delay_s=0.6)

        assert await again_until_there(broker, later) == ["later"]

    async def test_a_delayed_message_does_not_hold_up_others(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "far", delay_s=3600)
        await publish(broker, "near", delay_s=0.2)
        assert bodies(await pull(broker, wait_s=10)) == ["near"]
        assert (await broker.stats("work")).delayed == 1

    async def test_a_message_may_bring_its_own_retry_policy(self, broker: Broker) -> None:
        await subscribe(broker, retry=RetryPolicy(Backoff.FIXED, 3600, 3600, max_attempts=100))
        await publish(broker, "a", retry=RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=2))
        for attempt in (1, 2):
            (delivery,) = await pull(broker, wait_s=10)
            assert delivery.attempt == attempt
            await broker.nack("work", [Refusal(delivery.ack_id)])
        (letter,) = await dead(broker, count=1)
        assert letter.attempts == 2

    @pytest.mark.parametrize(
        ("backoff", "pauses"),
        [(Backoff.LINEAR, [0.2, 0.4]), (Backoff.EXPONENTIAL, [0.2, 0.4]), (Backoff.FIXED, [0.2, 0.2])],
    )
    async def test_each_retry_pauses_as_its_policy_says(
        self, broker: Broker, backoff: Backoff, pauses: list[float]
    ) -> None:
        await subscribe(broker, retry=RetryPolicy(backoff, 0.2, 10, max_attempts=5))
        await publish(broker, "a")
        (delivery,) = await pull(broker, wait_s=20)
        for pause in pauses:
            began = time.time()
            await broker.nack("work", [Refusal(delivery.ack_id)])
            (delivery,) = await pull(broker, wait_s=20)
            assert time.time() - began >= pause * 0.9  # exponential pauses have up to a tenth of jitter

    async def test_a_lapsed_nack_says_so_and_changes_nothing(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.acknowledge("work", [delivery.ack_id])
        assert await broker.nack("work", [Refusal(delivery.ack_id, dead=True)]) == [delivery.ack_id]
        assert (await broker.stats("work")).dead == 0
