"""What every Broker does: dead letters and logs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message, Refusal
from services.queueing.kept import Events, Position, Redrive, Where
from services.queueing.resources import Subscription, Topic
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tests.contracts.broker_steps import (
    AT_ONCE,
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
    from services.queueing.domain import Broker, Delivery


class KeepingContract:
    """What is kept."""

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

    async def test_a_redriven_letter_has_the_whole_ttl_again(self, broker: Broker) -> None:
        await subscribe(broker, ttl_s=0.5)
        await publish(broker, "late")
        (letter,) = await dead(broker, count=1)
        assert letter.reason == "expired"

        async def redrive() -> None:
            await dead(broker, count=1)
            assert await broker.redrive("work", Where(), Redrive()) == 1

        assert await again_until_there(broker, redrive) == ["late"]

    async def test_too_many_chosen_at_once_are_refused(self, broker: Broker) -> None:
        await self._graveyard(broker)
        with pytest.raises(InvalidArgumentError):
            await broker.purge("work", Where(ids=[str(number) for number in range(1001)]))
        assert await broker.purge("work", Where(ids=[str(number) for number in range(1000)])) == 3

    async def test_chosen_dead_letters_are_purged(self, broker: Broker) -> None:
        await self._graveyard(broker)
        assert await broker.purge("work", Where(reason="reply")) == 1
        assert (await broker.stats("work")).dead == 2

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

    @pytest.mark.parametrize("later_s", [3600.0, 1e12, 9e18])
    async def test_what_begins_behind_the_end_of_a_log_is_nothing(
        self, broker: Broker, later_s: float
    ) -> None:
        await self._logged(broker)
        await subscribe(broker, topic="audit")
        (*_, last) = await broker.list_events("audit", Events(), limit=100)
        behind = Events(from_sequence=min(last.sequence + int(later_s), 2**63 - 1))
        assert await self._events(broker, behind) == []
        assert await self._events(broker, Events(after=last.message.published + later_s)) == []
        assert await broker.replay("audit", behind, "work") == 0
        await broker.publish("audit", [Message(b"held")])
        await broker.seek("work", Position(sequence=behind.from_sequence))
        assert await settled(broker, ready=0)
        await broker.publish("audit", [Message(b"held")])
        await broker.seek("work", Position(time=time.time() + later_s))
        assert await settled(broker, ready=0)

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

    async def test_seek_to_a_past_time_without_a_log_is_done_with_what_is_older_and_nothing_else(
        self, broker: Broker
    ) -> None:
        await subscribe(broker)
        await publish(broker, "settled", "old", "leased")
        settled_one, _, held_old = await pull(broker, count=3)
        await broker.acknowledge("work", [settled_one.ack_id])
        await publish(broker, "delayed", delay_s=3600)
        then = time.time()
        await publish(broker, "new", "held")
        fresh, held = await pull(broker, wait_s=10, count=2), []
        while len(fresh) < 2:
            fresh += await pull(broker, wait_s=10)
        held = [delivery for delivery in fresh if delivery.data == b"held"]
        await broker.extend("work", [(d.ack_id, 0.0) for d in fresh if d.data == b"new"])
        await broker.seek("work", Position(time=then))
        assert await broker.acknowledge("work", [held_old.ack_id, held[0].ack_id]) == [held_old.ack_id]
        assert (await broker.stats("work")).delayed == 0
        assert await settled(broker, ready=1)
        await broker.seek("work", Position(time=1))  # brings nothing back
        await publish(broker, "newer")
        assert await arriving(broker, count=2) == ["new", "newer"]

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_what_a_seek_is_done_with_is_not_counted(self, broker: Broker, *, ordered: bool) -> None:
        await subscribe(broker, ordered=ordered)
        old, new = ([Message(b"", ordering_key=f"{n % 7}") for n in range(1000)] for _ in range(2))
        for _ in range(3):
            await broker.publish("jobs", old)
        await broker.seek("work", Position(time=time.time()))
        assert await settled(broker, ready=0)
        assert (await broker.stats("work")).unexamined == 0
        for _ in range(2):
            await broker.publish("jobs", new)
        assert await settled(broker, ready=2000)
        async with asyncio.timeout(60):
            while (await broker.stats("work")).unexamined:  # noqa: ASYNC110 - polls a server
                await asyncio.sleep(0.02)
        assert (await broker.stats("work")).ready == 2000

    async def test_what_is_delivered_again_after_a_seek_is_not_over(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "again")
        (delivery,) = await pull(broker)
        await broker.nack("work", [Refusal(delivery.ack_id, dead=True)])
        await broker.seek("work", Position(time=time.time()))
        assert await broker.redrive("work", Where(), Redrive()) == 1
        assert await arriving(broker, count=1) == ["again"]

    async def test_a_key_goes_on_behind_what_a_seek_is_done_with(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True)
        await publish(broker, "0", "1", ordering_key="k")
        assert bodies(await pull(broker, wait_s=10)) == ["0"]
        then = time.time()
        await publish(broker, "2", "3", ordering_key="k")
        await settled(broker, ready=3)
        await broker.seek("work", Position(time=then))
        assert bodies(await pull(broker, wait_s=10)) == ["2"]

    async def _done(self, broker: Broker, *expected: str) -> None:
        """Get these and be done with them."""
        found: list[Delivery] = []
        async with asyncio.timeout(60):
            while len(found) < len(expected):
                found += await pull(broker, wait_s=10)
        assert bodies(found) == list(expected)
        assert await broker.acknowledge("work", [delivery.ack_id for delivery in found]) == []

    async def test_what_a_subscription_retains_is_sought_back_by_time(self, broker: Broker) -> None:
        await subscribe(broker, retain_acked=True, ttl_s=3600, filter="attributes:wanted")
        await publish(broker, "a", attributes={"wanted": ""})
        await publish(broker, "other")
        await self._done(broker, "a")
        then = time.time()
        await publish(broker, "b", "c", attributes={"wanted": ""})
        await self._done(broker, "b", "c")
        await publish(broker, "d", attributes={"wanted": ""})
        (held,) = await pull(broker, wait_s=10)
        for _ in range(2):
            await broker.seek("work", Position(time=then))
            assert await broker.acknowledge("work", [held.ack_id]) == [held.ack_id]
            await self._done(broker, "b", "c", "d")
            assert await settled(broker, ready=0)
        await broker.seek("work", Position(time=0))
        await self._done(broker, "a", "b", "c", "d")
        await broker.seek("work", Position(time=time.time() + 1))
        assert await settled(broker, ready=0)

    async def test_what_is_retained_keeps_the_order_of_its_key(self, broker: Broker) -> None:
        await subscribe(broker, retain_acked=True, ttl_s=3600, ordered=True)
        await publish(broker, "0", "1", "2", ordering_key="k")
        for number in range(3):
            await self._done(broker, str(number))
        await broker.seek("work", Position(time=0))
        for number in range(3):
            await self._done(broker, str(number))

    async def test_what_is_retained_is_forgotten_with_the_wish_and_with_the_subscription(
        self, broker: Broker
    ) -> None:
        made = await subscribe(broker, retain_acked=True, ttl_s=3600)
        await publish(broker, "a")
        await self._done(broker, "a")
        await broker.update_subscription(replace(made, retain_acked=False))
        await broker.update_subscription(made)
        await publish(broker, "b")
        await self._done(broker, "b")
        await broker.seek("work", Position(time=0))
        await self._done(broker, "b")
        await broker.delete_subscription("work")
        await subscribe(broker, retain_acked=True, ttl_s=3600)
        await broker.seek("work", Position(time=0))
        assert await settled(broker, ready=0)

    async def test_to_retain_needs_a_time(self, broker: Broker) -> None:
        with pytest.raises(InvalidArgumentError):
            await subscribe(broker, retain_acked=True)

    async def test_a_replayed_event_has_the_whole_ttl_again(self, broker: Broker) -> None:
        await self._logged(broker)
        await subscribe(broker, ttl_s=0.5)
        await asyncio.sleep(0.6)

        async def replay() -> None:
            assert await broker.replay("audit", Events(kind="odd", ordering_key="k0"), "work") == 1

        assert set(await again_until_there(broker, replay)) == {"3"}

    async def test_what_is_forwarded_is_in_the_log_and_the_snapshots_of_its_topic(
        self, broker: Broker
    ) -> None:
        await self._graveyard(broker)
        await broker.create_topic(Topic("repair", log=True))
        await subscribe(broker, "mechanic", topic="repair")
        await broker.create_snapshot("before", "mechanic", {})
        assert await broker.redrive("work", Where(), Redrive("repair")) == 3
        assert sorted(await arriving(broker, "mechanic", count=3)) == ["a", "b", "c"]
        async with asyncio.timeout(30):
            while len(events := await broker.list_events("repair", Events(), limit=9)) < 3:  # noqa: ASYNC110 - polls a server
                await asyncio.sleep(0.02)
        assert sorted(event.message.data for event in events) == [b"a", b"b", b"c"]
        await broker.seek("mechanic", Position(snapshot="before"))
        assert sorted(await arriving(broker, "mechanic", count=3)) == ["a", "b", "c"]

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
