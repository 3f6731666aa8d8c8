"""Subscriptions that nobody uses are deleted, on either backend and by any replica."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Refusal
from services.queueing.expiry import METADATA, SCHEMA, Expiry, Uses
from services.queueing.kept import Events, Position, Redrive, Where
from services.queueing.resources import Subscription, Topic
from services.queueing.state import Database
from services.runtime.errors import NotFoundError
from tests.contracts.broker_steps import publish, pull, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from sqlalchemy import Connection

    from services.queueing.domain import Broker

pytestmark = pytest.mark.timeout(400)  # the first test may start the server
BOUND_S = 1.0
POLL_S = 0.05


@pytest.fixture
def uses() -> Uses:
    return Uses()


@pytest.fixture(params=["sqlite", "rabbitmq"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path, uses: Uses) -> AsyncIterator[Broker]:
    opened: AbstractAsyncContextManager[Broker]
    if request.param == "sqlite":
        opened = SqliteBroker(tmp_path / "queue.sqlite", used=uses.note)
    else:
        url = request.getfixturevalue("rabbitmq").url(request.getfixturevalue("rabbitmq_vhost"))
        opened = rabbit_broker(url, tmp_path / "broker.sqlite", used=uses.note)
    async with opened as broker:
        await broker.create_topic(Topic("jobs", log=True))
        yield broker


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(f"sqlite:///{tmp_path}/state.sqlite") as database:
        await database.migrate(SCHEMA)
        yield database


def expiry(broker: Broker, state: Database, uses: Uses) -> Expiry:
    return Expiry(broker, state, uses, poll_s=POLL_S, grace_s=0.0)


async def mortal(broker: Broker, name: str, **settings: Any) -> Subscription:
    return await subscribe(broker, name, expire_after_s=BOUND_S, **settings)


async def test_a_subscription_that_nobody_uses_is_deleted_and_one_that_is_used_stays(
    broker: Broker, state: Database, uses: Uses
) -> None:
    changed = await mortal(broker, "changed")
    kinds: dict[str, Callable[[], Awaitable[Any]]] = {
        "pulled": lambda: pull(broker, "pulled"),
        "acknowledged": lambda: broker.acknowledge("acknowledged", ["over"]),
        "refused": lambda: broker.nack("refused", [Refusal("over")]),
        "extended": lambda: broker.extend("extended", [("over", 1.0)]),
        "sought": lambda: broker.seek("sought", Position(time=1.0)),
        "replayed": lambda: broker.replay("jobs", Events(kind="none"), "replayed"),
        "redriven": lambda: broker.redrive("redriven", Where(), Redrive()),
        "purged": lambda: broker.purge("purged", Where()),
        "changed": lambda: broker.update_subscription(changed),
    }
    for name in (*kinds, "idle"):
        if name != "changed":
            await mortal(broker, name)
    await subscribe(broker, "immortal")
    await publish(broker, "a")
    one = expiry(broker, state, uses)
    deleted: list[str] = []
    async with asyncio.timeout(120):
        while not deleted:
            for use in kinds.values():
                await use()
            deleted = await one.sweep()
    assert deleted == ["idle"]
    with pytest.raises(NotFoundError):
        await broker.get_subscription("idle")
    left = [subscription.name for subscription in await broker.list_subscriptions(limit=100)]
    assert left == sorted([*kinds, "immortal"])


async def test_one_that_is_made_again_begins_anew(broker: Broker, state: Database, uses: Uses) -> None:
    one = expiry(broker, state, uses)
    for _ in range(2):
        await mortal(broker, "work")
        assert await one.sweep() == []
        async with asyncio.timeout(120):
            while await one.sweep() != ["work"]:  # noqa: ASYNC110 - waits for time to pass
                await asyncio.sleep(0.05)


async def test_a_use_through_one_replica_counts_at_all(broker: Broker, state: Database, uses: Uses) -> None:
    await mortal(broker, "idle")
    await mortal(broker, "busy")
    one, other = expiry(broker, state, uses), expiry(broker, state, Uses())
    deleted: list[str] = []
    async with asyncio.timeout(120):
        while not deleted:
            await pull(broker, "busy")
            deleted = [*await one.sweep(), *await other.sweep()]
    assert deleted == ["idle"]


async def test_one_that_is_old_and_gets_a_bound_is_not_deleted_for_what_was_before(
    broker: Broker, state: Database, uses: Uses
) -> None:
    old = await subscribe(broker, "old")
    await mortal(broker, "idle")
    one, other = expiry(broker, state, uses), expiry(broker, state, Uses())
    async with asyncio.timeout(120):
        while await one.sweep() != ["idle"]:  # noqa: ASYNC110 - waits for time to pass
            await asyncio.sleep(0.05)
    await broker.update_subscription(replace(old, expire_after_s=BOUND_S))
    assert await other.sweep() == []  # it was not told of the change


def test_uses_that_could_not_be_written_are_kept_and_those_too_many_are_told() -> None:
    uses = Uses()
    uses.note("a")
    ages = uses.take()
    assert not uses.noted("a")
    uses.put_back(ages)
    assert uses.noted("a")
    assert uses.complete_s > BOUND_S
    for number in range(100_001):
        uses.note(str(number))
    assert len(uses.take()) == 100_000
    assert uses.complete_s < 3600


async def test_the_steps_lead_to_the_table(state_url: str) -> None:
    def differences(connection: Connection) -> list[Any]:
        options = {"include_name": lambda name, kind, _: kind != "table" or str(name).startswith("expiry_")}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))

    async with Database(state_url) as database:
        await database.migrate(SCHEMA)
        async with database.transaction() as connection:
            assert await connection.run_sync(differences) == []
