"""What every Broker does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from services.queueing.domain import Backoff, Message, Refusal, RetryPolicy, Subscription
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Broker, Delivery

AT_ONCE = RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=3)


async def subscribe(broker: Broker, name: str = "work", **settings: Any) -> Subscription:
    return await broker.create_subscription(Subscription(name, "jobs", **{"retry": AT_ONCE, **settings}))


async def publish(broker: Broker, *bodies: str, **settings: Any) -> list[str]:
    return await broker.publish("jobs", [Message(body.encode(), **settings) for body in bodies])


async def pull(
    broker: Broker, name: str = "work", *, count: int = 100, max_bytes: int = 10**7, wait_s: float = 0
) -> list[Delivery]:
    return await broker.pull(name, max_messages=count, max_bytes=max_bytes, wait_s=wait_s)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.data.decode() for delivery in deliveries]


class BrokerContract:
    """Subclasses give a fixture `broker` with one topic, `jobs`."""

    async def test_messages_come_in_order_with_their_attributes(self, broker: Broker) -> None:
        await subscribe(broker)
        ids = await publish(broker, "a", "b", attributes={"k": "v"})
        ids += await publish(broker, "c")
        deliveries = await pull(broker)
        assert bodies(deliveries) == ["a", "b", "c"]
        assert [delivery.message_id for delivery in deliveries] == ids
        assert (deliveries[0].attributes, deliveries[0].attempt) == ({"k": "v"}, 1)

    async def test_each_subscription_gets_every_message_and_its_consumers_share_them(
        self, broker: Broker
    ) -> None:
        await subscribe(broker, "one")
        await subscribe(broker, "two")
        await publish(broker, "a", "b")
        assert bodies(await pull(broker, "one", count=1)) == ["a"]
        assert bodies(await pull(broker, "one")) == ["b"]
        assert bodies(await pull(broker, "two")) == ["a", "b"]

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
        (letter,) = await broker.list_dead_letters("work", limit=10)
        assert (letter.data, letter.attributes, letter.topic) == (b"poison", {"k": "v"}, "jobs")
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
        assert (again.attempt, again.message_id) == (1, delivery.message_id)
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
        (letter,) = await broker.list_dead_letters("work", limit=10)
        assert letter.reason == "lease expired"

    async def test_the_retry_policy_delays(self, broker: Broker) -> None:
        await subscribe(broker, retry=RetryPolicy(Backoff.FIXED, 0.2, 0.2, max_attempts=5))
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id)])
        assert await pull(broker) == []
        assert (await broker.stats("work")).delayed == 1
        assert bodies(await pull(broker, wait_s=10)) == ["a"]

    async def test_a_refusal_may_set_its_own_delay(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, delay_s=3600)])
        assert (await broker.stats("work")).delayed == 1

    async def test_a_delayed_message_comes_when_it_is_due(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "later", delay_s=0.2)
        await publish(broker, "now")
        assert bodies(await pull(broker)) == ["now"]
        assert bodies(await pull(broker, wait_s=10)) == ["later"]

    async def test_a_waiting_puller_is_woken_by_a_publish(self, broker: Broker) -> None:
        await subscribe(broker)
        waiting = asyncio.create_task(pull(broker, wait_s=30))
        while (await broker.stats("work")).ready == 0 and not waiting.done():
            await publish(broker, "a")
        assert bodies(await asyncio.wait_for(waiting, 5))[0] == "a"

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
        letters = await broker.list_dead_letters("work", limit=2)
        assert [letter.data for letter in letters] == [b"a", b"b"]
        rest = await broker.list_dead_letters("work", limit=2, after=int(letters[-1].id))
        assert [letter.data for letter in rest] == [b"c"]
        assert await broker.redrive("work", [letters[0].id]) == 1
        (again,) = await pull(broker)
        assert (again.data, again.attempt) == (b"a", 1)
        assert await broker.purge("work", []) == 2

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
