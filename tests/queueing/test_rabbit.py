"""The broker on a real RabbitMQ: its contract, and what happens when the server dies or falls silent."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.queueing.backends.rabbit import snapshots
from services.queueing.backends.rabbit.state import REPLICA, Deferral
from services.queueing.backends.rabbit.store import SqlState
from services.queueing.backends.rabbit.store.tables import METADATA, SCHEMA
from services.queueing.backends.rabbit.topology import snapshot_name
from services.queueing.backends.rabbit.wire import fresh
from services.queueing.domain import Message
from services.queueing.kept import Events
from services.queueing.resources import Subscription, Topic
from services.queueing.state import Database
from services.queueing.state.leases import Leases
from services.runtime.errors import ResourceExhaustedError, UnimplementedError
from tests.contracts.broker import BrokerContract
from tests.contracts.broker_snapshots import SnapshotContract
from tests.contracts.broker_steps import bodies, publish, pull, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sqlalchemy import Connection

    from services.queueing.backends.rabbit import RabbitBroker
    from services.queueing.domain import Broker
    from tests.servers.postgres import PostgresServer
    from tests.servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.timeout(400)  # the first test starts the server
PATIENCE_S = 120.0


@pytest.fixture
def url(rabbitmq: RabbitServer, rabbitmq_vhost: str) -> str:
    return rabbitmq.url(rabbitmq_vhost)


class TestRabbitBroker(BrokerContract, SnapshotContract):
    too_many = 40  # one after the other

    @pytest.fixture
    async def broker(self, url: str, state_url: str) -> AsyncIterator[RabbitBroker]:
        async with rabbit_broker(url, state_url) as broker:
            await broker.create_topic(Topic("jobs"))
            yield broker

    async def test_a_topics_settings_are_kept_and_change(self, broker: Broker) -> None:
        topic = await broker.create_topic(Topic("kept", log=True, retention_s=60, labels={"a": "b"}))
        assert await broker.get_topic("kept") == topic
        changed = await broker.update_topic(replace(topic, labels={"c": "d"}))
        assert await broker.get_topic("kept") == changed
        with pytest.raises(UnimplementedError):  # a stream's arguments are fixed
            await broker.update_topic(replace(topic, retention_s=120))

    async def test_what_was_not_compared_with_a_filter_yet_is_told(self, broker: Broker) -> None:
        await subscribe(broker, filter="attributes:wanted")
        await subscribe(broker, "every")  # what nobody wants is not published at all
        for attributes, count in (({"wanted": ""}, 600), ({"wanted": ""}, 600), ({}, 300)):
            await broker.publish("jobs", [Message(b"", attributes) for _ in range(count)])
        async with asyncio.timeout(60):
            while True:
                stats = await broker.stats("work")
                if (stats.ready, stats.unexamined) == (1500, 500):
                    break
                await asyncio.sleep(0.05)
        assert (await broker.stats("every")).unexamined == 0

    async def test_a_log_forgets_what_is_too_old_or_too_much(self, broker: Broker) -> None:
        """A stream forgets by whole segments, the last of which it keeps."""
        topic = Topic("audit", log=True, retention_bytes=400_000)
        await broker.create_topic(topic)
        for _ in range(30):
            await broker.publish("audit", [Message(b"x" * 100_000)])
        assert len(await broker.list_events("audit", Events(), limit=100)) < 20


@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
async def test_a_long_log_is_replayed_part_by_part_up_to_where_it_ended(
    broker_of_jobs: RabbitBroker,
) -> None:
    topic = await broker_of_jobs.get_topic("jobs")
    await broker_of_jobs.update_topic(replace(topic, log=True))
    every = [str(number) for number in range(1300)]
    for start in range(0, len(every), 650):
        await publish(broker_of_jobs, *every[start : start + 650])
    await subscribe(broker_of_jobs)
    (first, *_) = await broker_of_jobs.list_events("jobs", Events(), limit=1)
    for events in (Events(), Events(from_sequence=first.sequence)):
        assert await broker_of_jobs.replay("jobs", events, "work") == len(every)
        found: list[str] = []
        while len(found) < len(every):
            deliveries = await pull(broker_of_jobs, wait_s=30)
            assert deliveries, len(found)
            found += bodies(deliveries)
            await broker_of_jobs.acknowledge("work", [delivery.ack_id for delivery in deliveries])
        assert found == every


async def test_the_steps_lead_to_the_tables(state: Database) -> None:
    await state.migrate(SCHEMA)

    def differences(connection: Connection) -> list[Any]:
        options = {"include_name": lambda name, kind, _: kind != "table" or str(name).startswith("queues_")}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))

    async with state.transaction() as connection:
        assert await connection.run_sync(differences) == []


async def open_state(stack: AsyncExitStack, url: str, **settings: Any) -> SqlState:
    """The state as a replica opens it."""
    database = await stack.enter_async_context(Database(url))
    defaults = {"dedup_window_s": 600, "hold_s": 12, "max_waiting": 1000}
    return await stack.enter_async_context(SqlState(database, **{**defaults, **settings}))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_of_two_who_publish_the_same_at_once_one_does(state_url: str, stack: AsyncExitStack) -> None:
    state = await open_state(stack, state_url, hold_s=600)
    topic = await state.create_topic(Topic("jobs"))
    message = Message(b"", dedup_id="a\0b")
    found = await asyncio.gather(*(state.reserve(topic, [(message, str(n))]) for n in range(20)))
    assert sum(reservation.ours for (reservation,) in found) == 1
    assert len({reservation.message_id for (reservation,) in found}) == 1
    assert not any(reservation.published for (reservation,) in found)
    (waiting,) = await state.reserve(topic, [(message, "later")])
    assert not waiting.published
    assert not waiting.ours
    await state.confirmed(topic, [message])
    (again,) = await state.reserve(topic, [(message, "other")])
    assert (again.published, again.ours, again.message_id) == (True, False, found[0][0].message_id)


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_an_id_whose_message_was_not_confirmed_is_given_again_for_the_same_message(
    state_url: str, stack: AsyncExitStack, how: str
) -> None:
    state = await open_state(stack, state_url, hold_s=0.05 if how == "expired" else 60)
    topic = await state.create_topic(Topic("jobs"))
    message = Message(b"", dedup_id="a")
    await state.reserve(topic, [(message, "first")])
    if how == "released":
        await state.released(topic, [message])
    async with asyncio.timeout(30):
        while not (reservation := (await state.reserve(topic, [(message, "second")]))[0]).ours:  # noqa: ASYNC110 - polls a database
            await asyncio.sleep(0.01)
    assert (reservation.message_id, reservation.published) == ("first", False)


async def test_an_id_is_free_as_soon_as_the_lease_of_who_has_it_ends(
    state_url: str, stack: AsyncExitStack
) -> None:
    dead = await open_state(stack, state_url, hold_s=600, holder=lambda: f"{REPLICA}dead")
    other = await open_state(stack, state_url, hold_s=600)
    leases = Leases(await stack.enter_async_context(Database(state_url)), ttl_s=600)
    await leases.take(f"{REPLICA}dead", "dead")
    topic, message = await dead.create_topic(Topic("jobs")), Message(b"", dedup_id="a")
    await dead.reserve(topic, [(message, "first")])
    (waiting,) = await other.reserve(topic, [(message, "second")])
    assert (waiting.ours, waiting.holder) == (False, f"{REPLICA}dead")
    await leases.release("dead")
    (reservation,) = await other.reserve(topic, [(message, "second")])
    assert (reservation.message_id, reservation.ours) == ("first", True)
    await dead.released(topic, [message])  # it lives, after all
    (waiting,) = await dead.reserve(topic, [(message, "third")])
    assert (waiting.ours, waiting.published) == (False, False)


async def test_who_has_lost_an_id_does_not_release_it_for_who_has_it_now(
    state_url: str, stack: AsyncExitStack
) -> None:
    slow = await open_state(stack, state_url, hold_s=0.05)
    now, third = [await open_state(stack, state_url, hold_s=600) for _ in range(2)]
    topic, message = await slow.create_topic(Topic("jobs")), Message(b"", dedup_id="a")
    await slow.reserve(topic, [(message, "first")])
    async with asyncio.timeout(PATIENCE_S):
        while not (await now.reserve(topic, [(message, "second")]))[0].ours:  # noqa: ASYNC110 - polls a database
            await asyncio.sleep(0.01)
    await slow.released(topic, [message])
    (waiting,) = await third.reserve(topic, [(message, "third")])
    assert (waiting.published, waiting.ours) == (False, False)


async def test_without_replicas_ids_of_the_life_before_are_free_at_the_start(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    url, message = f"sqlite:///{tmp_path}/state.sqlite", Message(b"", dedup_id="a")
    before = await open_state(stack, url, hold_s=600)
    topic = await before.create_topic(Topic("jobs"))
    await before.reserve(topic, [(message, "first")])
    after = await open_state(stack, url, hold_s=600)
    (reservation,) = await after.reserve(topic, [(message, "second")])
    assert (reservation.message_id, reservation.ours) == ("first", True)


async def test_what_is_due_is_moved_by_one_replica(postgres: PostgresServer, stack: AsyncExitStack) -> None:
    url = stack.enter_context(postgres.database())
    states = [await open_state(stack, url) for _ in range(2)]
    await states[0].defer([Deferral("work", fresh("jobs", Message(b""), name, 0.0), 1.0) for name in "ab"])
    async with states[0].due(1) as first, states[1].due(9) as second:
        moved = [entry.message_id for entry in (*first, *second)]
        assert (len(first), sorted(moved)) == (1, ["a", "b"])
    async with states[1].due(9) as rest:
        assert rest == []


async def test_what_is_in_hands_is_not_due_again(tmp_path: Path, stack: AsyncExitStack) -> None:
    state = await open_state(stack, f"sqlite:///{tmp_path}/state.sqlite")
    await state.defer([Deferral("work", fresh("jobs", Message(b""), name, 0.0), 1.0) for name in "abc"])
    async with state.due(1) as first:
        with pytest.raises(ZeroDivisionError):
            async with state.due(1) as second:
                raise ZeroDivisionError
        async with state.due(9) as rest:
            found = [[entry.message_id for entry in entries] for entries in (first, second, rest)]
            assert found == [["a"], ["b"], ["b", "c"]]
    async with state.due(9) as none:
        assert none == []


async def test_what_waited_for_a_deleted_subscription_is_not_of_the_next_of_its_name(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    state = await open_state(stack, f"sqlite:///{tmp_path}/state.sqlite")
    await state.create_topic(Topic("jobs"))
    carried, later = fresh("jobs", Message(b""), "id", 0.0), time.time() + 3600
    for name in ("work", "other"):
        await state.create_subscription(Subscription(name, "jobs"))
        for _ in range(70):  # more than is dropped at once
            await state.defer([Deferral(name, carried, later)] * 100)
    await state.delete_subscription("work")
    await state.create_subscription(Subscription("work", "jobs"))
    await state.defer([Deferral("work", carried, later)])
    await state.create_subscription(Subscription("work", "jobs"))
    assert (await state.deferred("work"), await state.deferred("other")) == (1, 7000)
    await state.defer([Deferral("left", carried, later)])  # by a death while they were being dropped
    await state.create_subscription(Subscription("left", "jobs"))
    assert await state.deferred("left") == 0


async def test_a_topic_that_is_made_again_knows_no_ids(broker_of_jobs: RabbitBroker) -> None:
    await subscribe(broker_of_jobs)
    first = await publish(broker_of_jobs, "a", dedup_id="same")
    assert await publish(broker_of_jobs, "a", dedup_id="same") == first
    await broker_of_jobs.delete_topic("jobs")
    await broker_of_jobs.create_topic(Topic("jobs"))
    assert await publish(broker_of_jobs, "a", dedup_id="same") != first


@pytest.fixture
async def broker_of_jobs(url: str, state_url: str) -> AsyncIterator[RabbitBroker]:
    async with rabbit_broker(url, state_url) as broker:
        await broker.create_topic(Topic("jobs"))
        yield broker


async def drained(broker: RabbitBroker, count: int) -> list[int]:
    """So many messages, acknowledged, as sorted numbers."""
    found: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            deliveries = await pull(broker, wait_s=5)
            await broker.acknowledge("work", [delivery.ack_id for delivery in deliveries])
            found += map(int, bodies(deliveries))
    return sorted(found)


async def test_a_snapshot_that_cannot_be_made_leaves_nothing(
    broker_of_jobs: RabbitBroker, rabbitmq: RabbitServer, rabbitmq_vhost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_MAX_MESSAGES", 3)
    await subscribe(broker_of_jobs)
    await publish(broker_of_jobs, *map(str, range(5)))
    with pytest.raises(ResourceExhaustedError) as caught:
        await broker_of_jobs.create_snapshot("now", "work", {})
    assert caught.value.reason == "SNAPSHOT_TOO_LARGE"
    with rabbitmq.http() as http:
        queues = {queue["name"] for queue in http.get(f"/queues/{rabbitmq_vhost}").json()}
    assert queues
    assert not [name for name in queues if name.startswith(snapshot_name(""))]
    assert await drained(broker_of_jobs, 5) == list(range(5))
    await broker_of_jobs.create_snapshot("now", "work", {})


async def test_a_publish_is_acknowledged_when_its_new_queues_are_on_disk_too(
    url: str, state_url: str
) -> None:
    async with rabbit_broker(url, state_url, settle_s=1.5) as broker:
        await broker.create_topic(Topic("jobs"))
        work = await subscribe(broker)
        await publish(broker, "a")
        assert time.time() >= work.created + 1.4
