"""What every Broker's snapshots do."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.domain import Message
from services.queueing.kept import Position
from services.queueing.resources import DAY_S, Topic
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from tests.contracts.broker_steps import bodies, publish, pull, settled, subscribe

if TYPE_CHECKING:
    from services.queueing.domain import Broker


async def drained(broker: Broker, count: int, name: str = "work") -> list[str]:
    """So many messages, acknowledged one after the other."""
    found: list[str] = []
    while len(found) < count:
        deliveries = await pull(broker, name, wait_s=30)
        assert deliveries, f"only {found}"
        found += bodies(deliveries)
        await broker.acknowledge(name, [delivery.ack_id for delivery in deliveries])
    return found


class SnapshotContract:
    """Subclasses give a fixture `broker` with one topic, `jobs`."""

    async def test_a_subscription_is_set_back_to_what_it_held_and_what_came_since(
        self, broker: Broker
    ) -> None:
        await subscribe(broker)
        await publish(broker, "settled", "leased", "ready")
        first, _ = await pull(broker, count=2)
        await broker.acknowledge("work", [first.ack_id])
        await broker.create_snapshot("before", "work", {"why": "deploy"})
        await publish(broker, "after")
        for _ in range(2):  # it may be used again
            await broker.seek("work", Position(snapshot="before"))
            assert await drained(broker, 3) == ["leased", "ready", "after"]
            assert await settled(broker, ready=0)

    async def test_what_came_since_is_delivered_by_its_subscription_too(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        await broker.create_snapshot("now", "work", {})
        await publish(broker, "b")
        assert sorted(await drained(broker, 2)) == ["a", "b"]
        await broker.delete_subscription("work")
        await publish(broker, "c")
        await subscribe(broker, "other")
        await broker.seek("other", Position(snapshot="now"))
        assert await drained(broker, 3, "other") == ["a", "b", "c"]

    async def test_what_is_published_while_it_is_made_is_in_it_once(self, broker: Broker) -> None:
        await subscribe(broker)
        count, names = 0, ["a", "b", "c"]
        for name in names:
            made = asyncio.create_task(broker.create_snapshot(name, "work", {}))
            while not made.done():
                await asyncio.gather(*(publish(broker, str(count + n)) for n in range(10)))
                count += 10
            await made
        for name in names:
            await broker.seek("work", Position(snapshot=name))
            await publish(broker, str(count))  # comes after everything else
            count += 1
            assert sorted(map(int, await drained(broker, count))) == list(range(count))

    async def test_leases_of_before_a_seek_have_ended(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "a")
        (held,) = await pull(broker)
        await broker.create_snapshot("now", "work", {})
        await broker.seek("work", Position(snapshot="now"))
        assert await broker.acknowledge("work", [held.ack_id]) == [held.ack_id]
        assert await drained(broker, 1) == ["a"]

    async def test_a_restored_key_keeps_its_order(self, broker: Broker) -> None:
        await subscribe(broker, ordered=True)
        await publish(broker, "0", "1", ordering_key="k")
        await broker.create_snapshot("now", "work", {})
        await publish(broker, "2", "3", ordering_key="k")
        assert await drained(broker, 4) == ["0", "1", "2", "3"]
        await broker.seek("work", Position(snapshot="now"))
        assert bodies(await pull(broker, wait_s=30)) == ["0"]
        await broker.seek("work", Position(snapshot="now"))
        assert await drained(broker, 4) == ["0", "1", "2", "3"]

    async def test_a_filter_holds_for_what_is_restored(self, broker: Broker) -> None:
        await subscribe(broker, "all")
        await subscribe(broker, "some", filter="attributes:x")
        await broker.create_snapshot("of-all", "all", {})
        await broker.create_snapshot("of-some", "some", {})
        await publish(broker, "with", attributes={"x": ""})
        await publish(broker, "without")
        await broker.seek("some", Position(snapshot="of-all"))
        assert await drained(broker, 1, "some") == ["with"]
        await broker.seek("all", Position(snapshot="of-some"))
        assert await drained(broker, 1, "all") == ["with"]
        assert await settled(broker, ready=0, name="all")

    async def test_a_delayed_message_is_in_the_snapshot(self, broker: Broker) -> None:
        await subscribe(broker)
        await publish(broker, "early", delay_s=0.2)
        await broker.create_snapshot("now", "work", {})
        await publish(broker, "late", delay_s=0.2)
        assert sorted(await drained(broker, 2)) == ["early", "late"]
        await broker.seek("work", Position(snapshot="now"))
        assert sorted(await drained(broker, 2)) == ["early", "late"]

    async def test_snapshots_are_found_listed_changed_and_deleted(self, broker: Broker) -> None:
        await subscribe(broker)
        made = [await broker.create_snapshot(name, "work", {"n": name}) for name in ("b", "a", "c")]
        assert abs(made[0].expires - (time.time() + 7 * DAY_S)) < 3600
        assert await broker.get_snapshot("b") == made[0]
        assert [s.name for s in await broker.list_snapshots(limit=2)] == ["a", "b"]
        assert [s.name for s in await broker.list_snapshots(topic="jobs", limit=9, after="a")] == ["b", "c"]
        assert await broker.list_snapshots(topic="other", limit=9) == []
        changed = replace(made[0], expires=made[0].created + DAY_S, labels={"k": "v"})
        assert await broker.update_snapshot(changed) == changed == await broker.get_snapshot("b")
        await broker.delete_snapshot("b")
        with pytest.raises(NotFoundError):
            await broker.get_snapshot("b")

    async def test_what_cannot_be_is_refused(self, broker: Broker) -> None:
        await subscribe(broker)
        made = await broker.create_snapshot("now", "work", {})
        with pytest.raises(AlreadyExistsError):
            await broker.create_snapshot("now", "work", {})
        with pytest.raises(NotFoundError):
            await broker.create_snapshot("new", "nothing", {})
        with pytest.raises(InvalidArgumentError):
            await broker.create_snapshot("no name", "work", {})
        with pytest.raises(NotFoundError):
            await broker.seek("work", Position(snapshot="nothing"))
        with pytest.raises(NotFoundError):
            await broker.delete_snapshot("nothing")
        for expires in (time.time() - 1, made.created + 8 * DAY_S):
            with pytest.raises(InvalidArgumentError):
                await broker.update_snapshot(replace(made, expires=expires))
        await broker.create_topic(Topic("other"))
        await subscribe(broker, "elsewhere", topic="other")
        with pytest.raises(InvalidArgumentError):
            await broker.seek("elsewhere", Position(snapshot="now"))

    async def test_a_snapshot_expires_with_what_it_keeps(self, broker: Broker) -> None:
        await subscribe(broker)
        made = await broker.create_snapshot("short", "work", {})
        await publish(broker, "a")
        await broker.update_snapshot(replace(made, expires=time.time() + 0.5))
        while await broker.list_snapshots(limit=9):
            await publish(broker, "b")
        with pytest.raises(NotFoundError):
            await broker.seek("work", Position(snapshot="short"))
        await broker.create_snapshot("short", "work", {})

    async def test_a_snapshot_outlives_its_topic(self, broker: Broker) -> None:
        await broker.create_topic(Topic("brief"))
        await subscribe(broker, topic="brief")
        await broker.publish("brief", [Message(b"a")])
        await broker.create_snapshot("now", "work", {})
        await drained(broker, 1)
        await broker.delete_topic("brief")
        await broker.seek("work", Position(snapshot="now"))
        assert await drained(broker, 1) == ["a"]
