"""What every Broker does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message, Refusal
from services.queueing.kept import Events, Redrive, Where
from services.queueing.resources import Backoff, RetryPolicy, Subscription, Topic
from services.runtime.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from tests.contracts.broker_flow import FlowContract
from tests.contracts.broker_keeping import KeepingContract
from tests.contracts.broker_steps import bodies, publish, pull, settled, subscribe

if TYPE_CHECKING:
    from services.queueing.domain import Broker


class BrokerContract(FlowContract, KeepingContract):
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

    async def test_a_batch_that_is_refused_leaves_nothing_behind(self, broker: Broker) -> None:
        await broker.create_topic(Topic("audit", log=True))
        await subscribe(broker, topic="audit")
        good = [Message(b"a"), Message(b"b", delay_s=60), Message(b"c", dedup_id="c")]
        with pytest.raises(InvalidArgumentError) as caught:
            await broker.publish("audit", [*good, Message(b"", ttl_s=-1)])
        assert [violation.field for violation in caught.value.violations] == ["messages[3].ttl"]
        stats = await broker.stats("work")
        assert (stats.ready, stats.delayed) == (0, 0)
        assert await broker.list_events("audit", Events(), limit=1) == []
        await broker.publish("audit", good)  # its deduplication id was not taken either
        assert await settled(broker, ready=2)

    async def test_concurrent_consumers_never_share_a_message(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, *map(str, range(200)))
        pulls = await asyncio.gather(*(pull(broker, count=10) for _ in range(30)))
        seen = [body for deliveries in pulls for body in bodies(deliveries)]
        assert sorted(seen, key=int) == [str(number) for number in range(200)]

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
