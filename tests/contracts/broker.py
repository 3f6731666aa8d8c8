"""What every Broker does."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from services.queueing.domain import Events, Message, Position, Redrive, Refusal, Where
from services.queueing.resources import Backoff, Priority, RetryPolicy, Subscription, Topic
from services.runtime.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Broker, DeadLetter, Delivery

AT_ONCE = RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=3)


async def subscribe(broker: Broker, name: str = "work", topic: str = "jobs", **settings: Any) -> Subscription:
    return await broker.create_subscription(Subscription(name, topic, **{"retry": AT_ONCE, **settings}))


async def publish(broker: Broker, *bodies: str, **settings: Any) -> list[str]:
    return await broker.publish("jobs", [Message(body.encode(), **settings) for body in bodies])


async def pull(
    broker: Broker, name: str = "work", *, count: int = 100, max_bytes: int = 10**7, wait_s: float = 0
) -> list[Delivery]:
    return await broker.pull(name, max_messages=count, max_bytes=max_bytes, wait_s=wait_s)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.data.decode() for delivery in deliveries]


async def arriving(broker: Broker, name: str = "work", *, count: int) -> list[str]:
    """So many messages, which may come one after the other."""
    found: list[str] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += bodies(await pull(broker, name, wait_s=10))
    return found


async def dead(broker: Broker, *, count: int, name: str = "work") -> list[DeadLetter]:
    """The dead letters of a subscription, once there are so many."""
    async with asyncio.timeout(30):
        while len(letters := await broker.list_dead_letters(name, Where(), limit=100)) < count:  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.02)
    return letters


async def settled(broker: Broker, *, ready: int, name: str = "work") -> bool:
    """Wait until a subscription counts so many messages ready."""
    async with asyncio.timeout(30):
        while (await broker.stats(name)).ready != ready:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    return True


class BrokerContract:
    """Subclasses give a fixture `broker` with one topic, `jobs`."""

    async def test_messages_come_in_order_with_their_attributes(self, broker: Broker) -> None:
        await subscribe(broker)
        ids = await publish(broker, "a", "b", attributes={"k": "v"})
        ids += await publish(broker, "c")
        deliveries = await pull(broker)
        assert bodies(deliveries) == ["a", "b", "c"]
        assert [delivery.message.message_id for delivery in deliveries] == ids
        assert (deliveries[0].message.attributes, deliveries[0].attempt) == ({"k": "v"}, 1)

    async def test_each_subscription_gets_every_message_and_its_consumers_share_them(
        self, broker: Broker
    ) -> None:
        await subscribe(broker, "one")
        await subscribe(broker, "two")
        await publish(broker, "a", "b")
        assert bodies(await pull(broker, "one", count=1)) == ["a"]
        assert bodies(await pull(broker, "one")) == ["b"]
        assert bodies(await pull(broker, "two")) == ["a", "b"]

    async def test_the_subscribers_of_a_topic_are_told_those_by_pattern_too(self, broker: Broker) -> None:
        assert await broker.subscribers("jobs") == []
        one = await subscribe(broker, "one", filter="attributes:k")
        every = await broker.create_subscription(Subscription("every", "#"))
        await broker.create_topic(Topic("other"))
        assert sorted(s.name for s in await broker.subscribers("jobs")) == ["every", one.name]
        assert await broker.subscribers("other") == [every]
        await broker.delete_subscription("every")
        assert await broker.subscribers("other") == []
        with pytest.raises(NotFoundError):
            await broker.subscribers("nothing")

    async def test_a_puller_that_goes_away_takes_nothing_with_it(self, broker: Broker) -> None:
        await subscribe(broker)
        bodies_sent = [str(number) for number in range(20)]
        await publish(broker, *bodies_sent)
        for turns in range(8):
            puller = asyncio.create_task(pull(broker, count=2))
            for _ in range(turns):
                await asyncio.sleep(0)
            puller.cancel()
            await asyncio.gather(puller, return_exceptions=True)
            if not puller.cancelled():
                await broker.extend("work", [(each.ack_id, 0.0) for each in puller.result()])
        assert await settled(broker, ready=20)

    async def test_an_acknowledged_message_is_gone(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        assert await broker.acknowledge("work", [delivery.ack_id]) == []
        stats = await broker.stats("work")
        assert (stats.ready, stats.leased, stats.delayed, stats.dead) == (0, 0, 0, 0)

    async def test_ended_foreign_and_invented_leases_are_told(self, broker: Broker) -> None:
        await subscribe(broker)
        await subscribe(broker, "other")
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        assert await broker.acknowledge("other", [delivery.ack_id]) == [delivery.ack_id]
        assert await broker.acknowledge("work", ["invented"]) == ["invented"]
        await broker.acknowledge("work", [delivery.ack_id])
        assert await broker.acknowledge("work", [delivery.ack_id]) == [delivery.ack_id]

    async def test_a_refused_message_comes_again_and_then_dies_once_with_its_history(
        self, broker: Broker
    ) -> None:
        await subscribe(broker)
        await publish(broker, "poison", attributes={"k": "v"})
        for attempt in (1, 2, 3):
            (delivery,) = await pull(broker)
            assert delivery.attempt == attempt
            await broker.nack("work", [Refusal(delivery.ack_id, f"reason {attempt}")])
        assert await pull(broker) == []
        (letter,) = await broker.list_dead_letters("work", Where(), limit=10)
        assert (letter.message.data, letter.message.attributes, letter.message.topic) == (
            b"poison",
            {"k": "v"},
            "jobs",
        )
        assert letter.reason == "reason 3"
        assert [reason for _, reason in letter.history] == ["reason 1", "reason 2", "reason 3"]

    async def test_a_hopeless_message_dies_at_once(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "corrupt")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, "not a PDF", dead=True)])
        assert (await broker.stats("work")).dead == 1

    async def test_an_extended_lease_of_no_time_returns_without_counting(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        assert await pull(broker) == []
        await broker.extend("work", [(delivery.ack_id, 0)])
        (again,) = await pull(broker)
        assert (again.attempt, again.message.message_id) == (1, delivery.message.message_id)
        assert await broker.acknowledge("work", [delivery.ack_id]) == [delivery.ack_id]

    async def test_a_lost_consumers_message_comes_again_when_its_lease_ends(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.extend("work", [(delivery.ack_id, 0.05)])
        (again,) = await pull(broker, wait_s=10)
        assert again.attempt == 2
        assert await broker.acknowledge("work", [delivery.ack_id]) == [delivery.ack_id]

    async def test_a_message_whose_leases_only_end_dies_too(self, broker: Broker) -> None:
        await subscribe(broker, retry=RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=1))
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.extend("work", [(delivery.ack_id, 0.05)])
        assert await pull(broker, wait_s=0.5) == []
        (letter,) = await broker.list_dead_letters("work", Where(), limit=10)
        assert letter.reason == "lease expired"

    async def test_the_retry_policy_delays(self, broker: Broker) -> None:
        await subscribe(broker, retry=RetryPolicy(Backoff.FIXED, 3600, 3600, max_attempts=5))
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id)])
        assert await pull(broker) == []
        assert (await broker.stats("work")).delayed == 1

    async def test_a_refusal_may_set_its_own_delay(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, delay_s=3600)])
        assert (await broker.stats("work")).delayed == 1

    async def test_a_delayed_message_comes_when_it_is_due(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "later", delay_s=3)  # long enough for a slow machine to look in between
        await publish(broker, "now")
        assert bodies(await pull(broker)) == ["now"]
        assert bodies(await pull(broker, wait_s=30)) == ["later"]

    async def test_a_waiting_puller_is_woken_by_a_publish(self, broker: Broker) -> None:
        await subscribe(broker)
        waiting = asyncio.create_task(pull(broker, wait_s=30))
        while (await broker.stats("work")).ready == 0 and not waiting.done():
            await publish(broker, "a")
        assert bodies(await asyncio.wait_for(waiting, 30))[0] == "a"

    async def test_a_deduplication_id_is_stored_once(self, broker: Broker) -> None:
        await subscribe(broker)
        first = await publish(broker, "a", dedup_id="x")
        again = await publish(broker, "b", dedup_id="x")
        other = await publish(broker, "c", dedup_id="y")
        assert first == again != other
        assert bodies(await pull(broker)) == ["a", "c"]

    async def test_a_pull_is_bounded_by_messages_and_bytes(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "x" * 100, "y" * 100, "z" * 100)
        assert len(await pull(broker, max_bytes=250)) == 2
        assert len(await pull(broker, max_bytes=1)) == 1

    async def test_dead_letters_are_redriven_or_purged_by_choice(self, broker: Broker) -> None:
        await subscribe(broker, retry=RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=1))
        await publish(broker, "a", "b", "c")
        deliveries = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id) for delivery in deliveries])
        letters = await broker.list_dead_letters("work", Where(), limit=2)
        assert [letter.message.data for letter in letters] == [b"a", b"b"]
        rest = await broker.list_dead_letters("work", Where(), limit=2, after=int(letters[-1].id))
        assert [letter.message.data for letter in rest] == [b"c"]
        assert await broker.redrive("work", Where(ids=[letters[0].id]), Redrive()) == 1
        (again,) = await pull(broker)
        assert (again.data, again.attempt) == (b"a", 1)
        assert await broker.purge("work", Where()) == 2

    async def test_a_publish_without_subscription_and_a_late_subscription(self, broker: Broker) -> None:
        await publish(broker, "nobody listens")
        await subscribe(broker)
        assert await pull(broker) == []

    async def test_a_subscription_is_created_once_and_not_with_other_settings(self, broker: Broker) -> None:
        first = await subscribe(broker)
        assert await subscribe(broker) == first
        with pytest.raises(AlreadyExistsError):
            await subscribe(broker, ack_deadline_s=99)

    async def test_deleting_a_subscription_leaves_the_others(self, broker: Broker) -> None:
        await subscribe(broker, "one")
        await subscribe(broker, "two")
        await publish(broker, "a")
        await broker.delete_subscription("one")
        assert bodies(await pull(broker, "two")) == ["a"]
        with pytest.raises(NotFoundError):
            await pull(broker, "one")

    async def test_missing_things_are_not_found(self, broker: Broker) -> None:
        with pytest.raises(NotFoundError):
            await broker.publish("nothing", [Message(b"x")])
        with pytest.raises(NotFoundError):
            await broker.create_subscription(Subscription("s", "nothing"))
        with pytest.raises(NotFoundError):
            await broker.delete_topic("nothing")
        with pytest.raises(NotFoundError):
            await broker.stats("nothing")

    @pytest.mark.parametrize(
        "message",
        [
            Message(b"x" * (10 * 1024 * 1024 + 1)),
            Message(b"", {str(number): "" for number in range(65)}),
            Message(b"", {"k": "v" * 20_000}),
            Message(b"", delay_s=-1),
            Message(b"", delay_s=31 * 86400),
        ],
        ids=["large", "attributes", "attribute size", "negative delay", "long delay"],
    )
    async def test_messages_over_a_bound_are_refused_and_none_of_the_batch_is_stored(
        self, broker: Broker, message: Message
    ) -> None:
        await subscribe(broker)
        with pytest.raises(InvalidArgumentError):
            await broker.publish("jobs", [Message(b"good"), message])
        assert await pull(broker) == []

    async def test_concurrent_consumers_never_share_a_message(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, *map(str, range(200)))
        pulls = await asyncio.gather(*(pull(broker, count=10) for _ in range(30)))
        seen = [body for deliveries in pulls for body in bodies(deliveries)]
        assert sorted(seen, key=int) == [str(number) for number in range(200)]

    # Order.

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

    # What goes where.

    async def test_a_filter_lets_through_what_it_names(self, broker: Broker) -> None:
        await subscribe(broker, filter='attributes.kind = "a" OR hasPrefix(attributes.kind, "b")')
        for kind in ("a", "bc", "c"):
            await publish(broker, kind, attributes={"kind": kind})
        await publish(broker, "none")
        assert bodies(await pull(broker)) == ["a", "bc"]

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

    # Time.

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

    # Dead letters.

    async def test_given_up_messages_go_to_the_dead_letter_topic(self, broker: Broker) -> None:
        await broker.create_topic(Topic("graves"))
        await subscribe(broker, dead_letter_topic="graves")
        await broker.create_subscription(Subscription("mourner", "graves"))
        await publish(broker, "a", attributes={"k": "v"})
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, "bad", dead=True)])
        (grave,) = await pull(broker, "mourner", wait_s=10)
        assert (grave.data, grave.message.message_id) == (b"a", delivery.message.message_id)
        assert grave.message.attributes == {
            "k": "v",
            "plexus-dead-letter-subscription": "work",
            "plexus-dead-letter-topic": "jobs",
            "plexus-dead-letter-reason": "bad",
            "plexus-dead-letter-attempts": "1",
        }
        assert (await broker.stats("work")).dead == 0

    async def test_a_dead_letter_topic_that_nobody_hears_keeps_nothing(self, broker: Broker) -> None:
        await broker.create_topic(Topic("graves"))
        await subscribe(broker, dead_letter_topic="graves")
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, dead=True)])
        assert (await broker.stats("work")).dead == 1

    async def _graveyard(self, broker: Broker) -> None:
        """Three dead letters: a and b for `bad format`, c for `no reply`."""
        await subscribe(broker)
        await publish(broker, "a", "b", "c")
        deliveries = await pull(broker)
        reasons = ("bad format", "bad format", "no reply")
        await broker.nack(
            "work",
            [Refusal(d.ack_id, reason, dead=True) for d, reason in zip(deliveries, reasons, strict=True)],
        )

    async def test_dead_letters_are_found_by_reason_topic_and_time(self, broker: Broker) -> None:
        await self._graveyard(broker)

        async def found(where: Where) -> list[bytes]:
            letters = await broker.list_dead_letters("work", where, limit=10)
            return [letter.message.data for letter in letters]

        assert await found(Where(reason="format")) == [b"a", b"b"]
        assert await found(Where(topic="jobs")) == [b"a", b"b", b"c"]
        assert await found(Where(topic="other")) == []
        assert await found(Where(after=time.time() + 3600)) == []
        assert await found(Where(before=time.time() - 3600)) == []
        assert await found(Where(reason="reply", after=time.time() - 3600)) == [b"c"]
        assert await found(Where(ids=["invented"])) == []

    async def test_dead_letters_are_counted_by_reason(self, broker: Broker) -> None:
        await self._graveyard(broker)
        stats = await broker.dead_letter_stats("work")
        assert (stats.total, stats.reasons) == (3, {"bad format": 2, "no reply": 1})
        assert 0 < stats.oldest <= stats.newest <= time.time()

    async def test_chosen_dead_letters_are_redriven_to_another_topic(self, broker: Broker) -> None:
        await self._graveyard(broker)
        await broker.create_topic(Topic("repair"))
        await broker.create_subscription(Subscription("mechanic", "repair"))
        assert await broker.redrive("work", Where(reason="bad format"), Redrive("repair")) == 2
        assert await arriving(broker, "mechanic", count=2) == ["a", "b"]
        assert (await broker.stats("work")).dead == 1

    async def test_a_redrive_to_a_topic_that_nobody_hears_is_refused(self, broker: Broker) -> None:
        await self._graveyard(broker)
        await broker.create_topic(Topic("void"))
        with pytest.raises(FailedPreconditionError):
            await broker.redrive("work", Where(), Redrive("void"))
        assert (await broker.stats("work")).dead == 3

    async def test_a_redrive_keeps_to_its_rate(self, broker: Broker) -> None:
        await self._graveyard(broker)
        assert await broker.redrive("work", Where(), Redrive(per_second=0.001)) == 3
        assert bodies(await pull(broker, wait_s=10)) == ["a"]
        assert (await broker.stats("work")).delayed == 2

    async def test_chosen_dead_letters_are_purged(self, broker: Broker) -> None:
        await self._graveyard(broker)
        assert await broker.purge("work", Where(reason="reply")) == 1
        assert (await broker.stats("work")).dead == 2

    # Changing things.

    async def test_a_subscriptions_settings_change_except_those_fixed(self, broker: Broker) -> None:
        before = await subscribe(broker)
        changed = await broker.update_subscription(replace(before, ack_deadline_s=99, labels={"a": "b"}))
        assert (
            await broker.get_subscription("work")
            == changed
            == replace(before, ack_deadline_s=99, labels={"a": "b"})
        )
        with pytest.raises(InvalidArgumentError):
            await broker.update_subscription(replace(changed, filter="attributes:x"))

    async def test_a_detached_subscription_gets_and_gives_nothing(self, broker: Broker) -> None:
        subscription = await subscribe(broker)
        await publish(broker, "a")
        await broker.update_subscription(replace(subscription, detached=True))
        with pytest.raises(FailedPreconditionError):
            await pull(broker)
        await publish(broker, "b")
        stats = await broker.stats("work")
        assert (stats.ready, stats.leased, stats.delayed) == (0, 0, 0)

    async def test_a_topics_settings_are_kept_and_change(self, broker: Broker) -> None:
        topic = await broker.create_topic(Topic("kept", log=True, retention_s=60, labels={"a": "b"}))
        assert await broker.get_topic("kept") == topic
        changed = await broker.update_topic(replace(topic, retention_s=120))
        assert await broker.get_topic("kept") == changed
        with pytest.raises(AlreadyExistsError):
            await broker.create_topic(Topic("kept"))

    async def test_listings_go_on_after_a_name(self, broker: Broker) -> None:
        for name in ("b", "a", "c"):
            await broker.create_topic(Topic(name))
            await broker.create_subscription(Subscription(f"sub-{name}", name))
        assert [topic.name for topic in await broker.list_topics(limit=2)] == ["a", "b"]
        assert [topic.name for topic in await broker.list_topics(limit=9, after="b")] == ["c", "jobs"]
        subscriptions = await broker.list_subscriptions(limit=9, after="sub-a")
        assert [subscription.name for subscription in subscriptions] == ["sub-b", "sub-c"]
        assert [s.name for s in await broker.list_subscriptions(topic="c", limit=9)] == ["sub-c"]

    async def test_a_subscription_outlives_its_topic(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        await broker.delete_topic("jobs")
        assert bodies(await pull(broker, wait_s=10)) == ["a"]
        with pytest.raises(NotFoundError):
            await publish(broker, "b")

    async def test_a_waiting_puller_ends_when_its_subscription_is_deleted(self, broker: Broker) -> None:
        await subscribe(broker)
        waiting = asyncio.create_task(pull(broker, wait_s=60))
        await asyncio.sleep(0)
        await broker.delete_subscription("work")
        with pytest.raises(NotFoundError):
            await asyncio.wait_for(waiting, 30)

    @pytest.mark.parametrize("delay_s", [-1, 31 * 86400], ids=["negative", "over the bound"])
    async def test_a_refusals_delay_is_bounded(self, broker: Broker, delay_s: float) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        with pytest.raises(InvalidArgumentError):
            await broker.nack("work", [Refusal(delivery.ack_id, delay_s=delay_s)])
        assert await broker.acknowledge("work", [delivery.ack_id]) == []

    async def test_a_paused_consumer_does_not_stop_another_subscription(self, broker: Broker) -> None:
        await subscribe(broker, "paused")
        await subscribe(broker, "busy")
        await publish(broker, *map(str, range(50)))
        held = await pull(broker, "paused", count=10)
        assert len(held) == 10
        assert len(await pull(broker, "busy")) == 50

    # Logs.

    async def _logged(self, broker: Broker) -> None:
        await broker.create_topic(Topic("audit", log=True))
        for number in range(6):
            kind = "even" if number % 2 == 0 else "odd"
            message = Message(
                b"%d" % number, {"type": kind}, correlation_id=f"c{number % 3}", ordering_key=f"k{number % 3}"
            )
            await broker.publish("audit", [message])

    async def _events(self, broker: Broker, events: Events, limit: int = 100) -> list[str]:
        return [e.message.data.decode() for e in await broker.list_events("audit", events, limit=limit)]

    async def test_a_log_keeps_what_was_published_in_order(self, broker: Broker) -> None:
        await self._logged(broker)
        events = await broker.list_events("audit", Events(), limit=100)
        assert [event.message.data for event in events] == [b"%d" % number for number in range(6)]
        sequences = [event.sequence for event in events]
        assert sequences == sorted(set(sequences))
        assert await self._events(broker, Events(from_sequence=sequences[4])) == ["4", "5"]
        assert await self._events(broker, Events(), limit=2) == ["0", "1"]

    async def test_events_are_found_by_type_correlation_key_and_time(self, broker: Broker) -> None:
        await self._logged(broker)
        assert await self._events(broker, Events(kind="odd")) == ["1", "3", "5"]
        assert await self._events(broker, Events(correlation_id="c1")) == ["1", "4"]
        assert await self._events(broker, Events(ordering_key="k2", kind="even")) == ["2"]
        (third,) = (await broker.list_events("audit", Events(), limit=4))[3:]
        assert await self._events(broker, Events(after=third.message.published)) == ["3", "4", "5"]
        assert await self._events(broker, Events(before=third.message.published)) == ["0", "1", "2"]

    async def test_events_are_replayed_to_one_subscription(self, broker: Broker) -> None:
        await self._logged(broker)
        for name in ("one", "two"):
            await broker.create_subscription(Subscription(name, "audit", retry=AT_ONCE))
        assert await broker.replay("audit", Events(kind="odd"), "one") == 3
        assert await arriving(broker, "one", count=3) == ["1", "3", "5"]
        assert await pull(broker, "two") == []

    async def test_a_subscription_is_set_back_and_forth_along_the_log(self, broker: Broker) -> None:
        await broker.create_topic(Topic("audit", log=True))
        await broker.create_subscription(Subscription("reader", "audit", retry=AT_ONCE))
        await broker.publish("audit", [Message(b"%d" % number) for number in range(4)])
        found = await pull(broker, "reader")
        await broker.acknowledge("reader", [delivery.ack_id for delivery in found])
        events = await broker.list_events("audit", Events(), limit=10)
        await broker.seek("reader", Position(sequence=events[2].sequence))
        assert await arriving(broker, "reader", count=2) == ["2", "3"]
        await broker.seek("reader", Position(time=0))
        assert await arriving(broker, "reader", count=4) == ["0", "1", "2", "3"]
        await broker.seek("reader", Position(time=time.time() + 1))
        assert await pull(broker, "reader") == []

    async def test_seek_without_a_log_drops_what_is_older(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        with pytest.raises(FailedPreconditionError):
            await broker.seek("work", Position(sequence=1))
        await broker.seek("work", Position(time=time.time() + 1))
        assert await pull(broker) == []

    async def test_a_topic_without_a_log_has_no_events(self, broker: Broker) -> None:
        with pytest.raises(FailedPreconditionError):
            await broker.list_events("jobs", Events(), limit=1)
        with pytest.raises(NotFoundError):
            await broker.list_events("nothing", Events(), limit=1)

    async def test_a_log_forgets_what_is_too_old_or_too_much(self, broker: Broker) -> None:
        topic = await broker.create_topic(Topic("audit", log=True))
        await broker.publish("audit", [Message(b"x" * 1000) for _ in range(10)])
        await broker.update_topic(replace(topic, retention_bytes=3500))
        assert len(await self._events(broker, Events())) == 3
