"""The store of sagas, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.queueing.resources import Backoff, RetryPolicy
from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.domain import Kind, Order, Problem, Saga, State, Which
from services.queueing.sagas.machine import Cancel, Failed, Sent, Succeeded, Tick
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.tables import METADATA
from services.runtime.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from services.queueing.state import Database

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("postgres")]
MANY = 1000
RETRY = RetryPolicy(Backoff.IMMEDIATE, max_attempts=1000)
ORDER = Definition(
    "order",
    (
        Step("reserve", Action("reserve", timeout_s=600, retry=RETRY), Action("release", retry=RETRY)),
        Step("charge", Action(method="vectors/GetPoints", request={"collection": "${input.name}"})),
    ),
    {"team": "shop"},
)


@pytest.fixture
async def store(state: Database) -> DatabaseSagaStore:
    store = DatabaseSagaStore(state)
    await store.create_definition(ORDER)
    return store


async def start(store: DatabaseSagaStore, saga_id: str = "", **more: str) -> Saga:
    return await store.start(
        Order("order", {"sku": 7, "text": "\x00\u2028"}, saga_id, **more), max_running=MANY
    )


def call(saga: Saga) -> str:
    assert saga.attempt is not None
    return saga.attempt.call_id


async def finish(store: DatabaseSagaStore, saga_id: str) -> Saga:
    saga = await store.get(saga_id)
    while saga.attempt is not None:
        saga = (await store.change(saga_id, Succeeded(call(saga), {"of": call(saga)}))).saga
    return saga


async def test_the_steps_lead_to_the_tables(state: Database) -> None:
    await DatabaseSagaStore(state).counts()

    def differences(connection: Connection) -> list[object]:
        ours = {"include_name": lambda name, kind, _parents: kind != "table" or name in METADATA.tables}
        context = MigrationContext.configure(connection, opts={**ours, "compare_type": True})
        return list(compare_metadata(context, METADATA))

    async with state.reading() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_definition_is_kept_as_it_was_given(store: DatabaseSagaStore) -> None:
    kept = await store.get_definition("order")
    assert replace(kept, version=0, created=0.0, updated=0.0) == ORDER
    assert (kept.version, kept.created) == (1, kept.updated)
    with pytest.raises(AlreadyExistsError):
        await store.create_definition(ORDER)
    with pytest.raises(NotFoundError):
        await store.get_definition("other")
    with pytest.raises(NotFoundError):
        await store.get_definition("order", 2)


async def test_a_change_is_a_new_version_and_no_change_is_none(store: DatabaseSagaStore) -> None:
    first = await store.get_definition("order")
    assert await store.update_definition(ORDER) == first
    second = await store.update_definition(replace(ORDER, labels={}))
    assert (second.version, second.created) == (2, first.created)
    assert await store.get_definition("order") == second
    assert await store.get_definition("order", 1) == first
    with pytest.raises(NotFoundError):
        await store.update_definition(replace(ORDER, name="other"))


async def test_definitions_are_listed_in_their_newest_version(store: DatabaseSagaStore) -> None:
    for name in ("a", "z"):
        await store.create_definition(replace(ORDER, name=name))
    await store.update_definition(replace(ORDER, labels={}))
    found = await store.list_definitions(limit=2)
    assert [(each.name, each.version) for each in found] == [("a", 1), ("order", 2)]
    assert [each.name for each in await store.list_definitions(limit=2, after="order")] == ["z"]


async def test_a_running_saga_keeps_its_version_however_many_follow(
    store: DatabaseSagaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.queueing.sagas.catalogue.MAX_VERSIONS", 5)
    saga = await start(store, "old")
    for number in range(6):
        await store.update_definition(replace(ORDER, steps=ORDER.steps[:1], labels={"n": str(number)}))
    assert len((await finish(store, saga.id)).steps) == 2
    assert (await start(store, "new")).version == 7
    await store.update_definition(ORDER)
    with pytest.raises(NotFoundError):
        await store.get_definition("order", 1)  # nobody runs it any more


async def test_a_definition_in_use_is_not_deleted(store: DatabaseSagaStore) -> None:
    saga = await start(store)
    with pytest.raises(FailedPreconditionError):
        await store.delete_definition("order")
    await finish(store, saga.id)
    await store.delete_definition("order")
    with pytest.raises(NotFoundError):
        await start(store)
    with pytest.raises(NotFoundError):
        await store.delete_definition("order")
    assert (await store.get(saga.id)).state is State.SUCCEEDED


async def test_a_saga_is_kept_with_input_results_and_history(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1", trace="00-a-b-01")
    assert await store.get("s1") == saga
    assert (saga.trace, saga.input) == ("00-a-b-01", {"sku": 7, "text": "\x00\u2028"})
    sent = (await store.change("s1", Sent(call(saga)))).saga
    assert await store.get("s1") == sent
    done = await finish(store, "s1")
    assert await store.get("s1") == done
    assert done.results["reserve"] == {"of": call(saga)}
    kinds = [record.kind for record in await store.events("s1", limit=MANY)]
    attempt = [Kind.ATTEMPT_STARTED, Kind.ATTEMPT_SUCCEEDED]
    assert kinds == [Kind.STARTED, *attempt, *attempt, Kind.SUCCEEDED]
    (last,) = await store.events("s1", limit=MANY, after=done.revision - 1)
    assert (last.revision, last.state) == (done.revision, State.SUCCEEDED)
    assert await store.events("s1", limit=MANY, after=done.revision) == []
    for missing in (store.get("no"), store.events("no", limit=1), store.change("no", Tick())):
        with pytest.raises(NotFoundError):
            await missing


async def test_what_an_event_may_not_do_changes_nothing(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    done = await finish(store, "s1")
    with pytest.raises(FailedPreconditionError):
        await store.change("s1", Cancel())
    assert await store.get("s1") == done


async def test_events_at_once_are_applied_one_after_the_other(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1")
    answers = [Succeeded(call(saga), number) for number in range(10)]
    await asyncio.gather(*(store.change("s1", answer) for answer in answers))
    saga = await store.get("s1")
    assert saga.position == 1
    assert sum(r.kind is Kind.ATTEMPT_SUCCEEDED for r in await store.events("s1", limit=MANY)) == 1


async def test_a_repeated_request_starts_one_saga(store: DatabaseSagaStore) -> None:
    first = await start(store, request="r1", digest="d")
    assert await start(store, request="r1", digest="d") == first
    with pytest.raises(InvalidArgumentError) as caught:
        await start(store, request="r1", digest="other")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    both = await asyncio.gather(*(start(store, request="r2", digest="d") for _ in range(5)))
    assert len({saga.id for saga in both}) == 1
    assert len(await store.list_sagas(Which(), limit=MANY)) == 2


async def test_an_id_is_of_one_saga(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    with pytest.raises(AlreadyExistsError):
        await start(store, "s1", request="r1", digest="d")


async def test_no_more_run_than_may(store: DatabaseSagaStore) -> None:
    for saga_id in ("s1", "s2"):
        await start(store, saga_id)
    with pytest.raises(ResourceExhaustedError):
        await store.start(Order("order", {}), max_running=2)
    await finish(store, "s1")
    await store.start(Order("order", {}), max_running=2)


async def test_sagas_are_listed_the_newest_first(store: DatabaseSagaStore) -> None:
    await store.create_definition(replace(ORDER, name="other"))
    for number in range(5):
        await start(store, f"s{number}")
    await store.start(Order("other", {}, "t"), max_running=MANY)
    await finish(store, "s2")
    everything = await store.list_sagas(Which(), limit=MANY)
    assert [saga.id for saga in everything] == ["t", "s4", "s3", "s2", "s1", "s0"]
    assert everything[1].input == {}
    after = (everything[1].created, "s4")
    assert [s.id for s in await store.list_sagas(Which(), limit=2, before=after)] == ["s3", "s2"]
    (done,) = await store.list_sagas(Which("order", State.SUCCEEDED), limit=MANY)
    assert done.id == "s2"
    assert await store.list_sagas(Which("other", State.SUCCEEDED), limit=MANY) == []
    assert await store.counts() == {State.RUNNING: 5}


async def test_a_saga_has_one_driver_at_a_time(store: DatabaseSagaStore) -> None:
    for number in range(20):
        await start(store, f"s{number}")
    claims = await asyncio.gather(*(store.claim(f"o{n}", limit=7, lease_s=60) for n in range(4)))
    taken = [saga_id for claim in claims for saga_id in claim]
    assert len(taken) == len(set(taken))
    rest = await store.claim("rest", limit=MANY, lease_s=60)
    assert sorted([*taken, *rest]) == sorted(f"s{number}" for number in range(20))
    assert await store.claim("late", limit=MANY, lease_s=60) == []


async def test_the_sagas_of_a_dead_driver_are_taken_over(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    assert await store.claim("dead", limit=1, lease_s=0.01) == ["s1"]
    await asyncio.sleep(await store.next_due_s(most=60) + 0.05)
    assert await store.claim("other", limit=1, lease_s=60) == ["s1"]
    await store.renew("dead", ["s1"], lease_s=60)
    await store.release("s1", "dead", retry_s=0)  # it is not his any more
    saga, _ = await store.work("s1")
    assert not (await store.drive("s1", "dead", Sent(call(saga))))[1]
    assert await store.claim("third", limit=1, lease_s=60) == []


async def test_a_lease_that_is_renewed_goes_on(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    await store.claim("me", limit=1, lease_s=0.01)
    await store.renew("me", ["s1"], lease_s=60)
    assert await store.claim("other", limit=1, lease_s=60) == []
    assert await store.next_due_s(most=5) == 5


async def test_a_saga_is_given_back_when_nothing_is_to_be_done_at_once(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    await store.claim("me", limit=1, lease_s=60)
    saga, definition = await store.work("s1")
    assert definition == await store.get_definition("order")
    assert (await store.drive("s1", "me", Tick()))[1]  # still to be sent
    made, held = await store.drive("s1", "me", Sent(call(saga)))
    assert not held
    assert await store.claim("me", limit=1, lease_s=60) == []
    assert await store.next_due_s(most=5) == 5
    assert 5 < await store.next_due_s(most=MANY) <= 600
    await store.change("s1", Succeeded(call(made.saga)))
    assert await store.next_due_s(most=5) == 0
    assert await store.claim("me", limit=1, lease_s=60) == ["s1"]


async def test_a_saga_that_cannot_be_driven_now_is_left_alone_for_a_while(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    await store.claim("me", limit=1, lease_s=60)
    await store.release("s1", "me", retry_s=60)
    assert await store.claim("me", limit=1, lease_s=60) == []
    assert await store.next_due_s(most=5) == 5


async def test_a_history_forgets_its_oldest(
    store: DatabaseSagaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.queueing.sagas.store.MAX_EVENTS", 20)
    saga = await start(store, "s1")
    while saga.revision < 30:
        saga = (await store.change("s1", Failed(call(saga), Problem("UNAVAILABLE")))).saga
    kept = await store.events("s1", limit=MANY)
    assert len(kept) == 20
    assert kept[-1].revision == saga.revision


async def test_sagas_that_ended_long_ago_are_forgotten(store: DatabaseSagaStore) -> None:
    for saga_id in ("s1", "s2", "s3"):
        await start(store, saga_id)
    first = await finish(store, "s1")
    await finish(store, "s2")
    assert await store.purge(ended_before=first.ended, limit=MANY) == 0
    assert await store.purge(ended_before=first.ended + 1000, limit=1) == 1
    assert await store.purge(ended_before=first.ended + 1000, limit=MANY) == 1
    assert [saga.id for saga in await store.list_sagas(Which(), limit=MANY)] == ["s3"]
    with pytest.raises(NotFoundError):
        await store.events("s1", limit=1)
