"""The store of sagas, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from services.queueing.resources import Backoff, RetryPolicy
from services.queueing.sagas.contract import Change, Lease, Made, Order, Which
from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.domain import Kind, Problem, Saga, State
from services.queueing.sagas.machine import Cancel, Failed, Resume, Sent, Succeeded, Tick
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.tables import METADATA
from services.runtime.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PlexusError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from services.queueing.sagas.machine import Event
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


async def write(store: DatabaseSagaStore, job: Order | Change, lease: Lease | None = None) -> Made:
    (made,) = await store.write([job], lease)
    if isinstance(made, PlexusError):
        raise made
    return made


def order(saga_id: str = "", *, request: str = "", digest: str = "", trace: str = "") -> Order:
    return Order("order", {"sku": 7, "text": "\x00\u2028"}, saga_id, request, digest, trace)


async def start(store: DatabaseSagaStore, saga_id: str = "", **more: str) -> Saga:
    return (await write(store, order(saga_id, **more))).saga


async def change(store: DatabaseSagaStore, saga_id: str, event: Event) -> Saga:
    return (await write(store, Change(saga_id, event))).saga


def lease(owner: str, seconds: float = 60.0, room: int = MANY) -> Lease:
    return Lease(owner, seconds, room)


async def claim(store: DatabaseSagaStore, wanted: Lease) -> list[str]:
    return [made.saga.id for made in await store.claim(wanted)]


def call(saga: Saga) -> str:
    assert saga.attempt is not None
    return saga.attempt.call_id


async def finish(store: DatabaseSagaStore, saga_id: str) -> Saga:
    saga = await store.get(saga_id)
    while saga.attempt is not None:
        saga = await change(store, saga_id, Succeeded(call(saga), {"of": call(saga)}))
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
    sent = await change(store, "s1", Sent(call(saga)))
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
    for missing in (store.get("no"), store.events("no", limit=1), change(store, "no", Tick())):
        with pytest.raises(NotFoundError):
            await missing


async def test_what_an_event_may_not_do_changes_nothing(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    done = await finish(store, "s1")
    with pytest.raises(FailedPreconditionError):
        await change(store, "s1", Cancel())
    assert await store.get("s1") == done


async def test_events_at_once_are_applied_one_after_the_other(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1")
    answers = [Succeeded(call(saga), number) for number in range(10)]
    await asyncio.gather(*(change(store, "s1", answer) for answer in answers))
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
        await write(store, replace(order(), max_running=2))
    await finish(store, "s1")
    await write(store, replace(order(), max_running=2))


async def test_sagas_are_listed_the_newest_first(store: DatabaseSagaStore) -> None:
    await store.create_definition(replace(ORDER, name="other"))
    for number in range(5):
        await start(store, f"s{number}")
    await write(store, Order("other", {}, "t"))
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
    claims = await asyncio.gather(*(claim(store, lease(f"o{n}", room=7)) for n in range(4)))
    taken = [saga_id for claim in claims for saga_id in claim]
    assert len(taken) == len(set(taken))
    rest = await claim(store, lease("rest"))
    assert sorted([*taken, *rest]) == sorted(f"s{number}" for number in range(20))
    assert await claim(store, lease("late")) == []


async def test_the_sagas_of_a_dead_driver_are_taken_over(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1")
    assert await claim(store, lease("dead", 0.01)) == ["s1"]
    await asyncio.sleep(await store.next_due_s(most=60) + 0.05)
    assert await claim(store, lease("other")) == ["s1"]
    await store.renew("dead", ["s1"], lease_s=60)
    await store.release(["s1"], "dead", retry_s=0)  # it is not his any more
    await store.release_all("dead")
    assert not (await write(store, Change("s1", Cancel()), lease("dead"))).held
    assert (await write(store, Change("s1", Tick()), lease("other"))).held
    assert await claim(store, lease("third")) == []
    await write(store, Change("s1", Sent(call(saga))), lease("dead"))
    assert not (await write(store, Change("s1", Tick()), lease("other"))).held


async def test_a_lease_that_is_renewed_goes_on(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    await store.claim(lease("me", 0.01))
    await store.renew("me", ["s1"], lease_s=60)
    assert await claim(store, lease("other")) == []
    assert await store.next_due_s(most=5) == 5


async def test_a_saga_is_given_back_when_nothing_is_to_be_done_at_once(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1")
    (made,) = await store.claim(lease("me"))
    assert (made.saga, made.definition, made.held) == (saga, await store.get_definition("order"), True)
    assert (await write(store, Change("s1", Tick()), lease("me"))).held  # still to be sent
    made = await write(store, Change("s1", Sent(call(saga))), lease("me"))
    assert not made.held
    assert await claim(store, lease("me")) == []
    assert await store.next_due_s(most=5) == 5
    assert 5 < await store.next_due_s(most=MANY) <= 600
    await change(store, "s1", Succeeded(call(made.saga)))
    assert await store.next_due_s(most=5) == 0
    assert await claim(store, lease("me")) == ["s1"]


async def test_who_writes_has_what_it_asks_for_as_far_as_there_is_room(store: DatabaseSagaStore) -> None:
    made = [await write(store, order(f"s{n}"), lease("me", room=1 - n)) for n in range(2)]
    assert [each.held for each in made] == [True, False]
    assert await claim(store, lease("other")) == ["s1"]


async def test_an_answer_takes_a_saga_from_who_sent_the_request_and_nothing_else_does(
    store: DatabaseSagaStore,
) -> None:
    saga = (await write(store, order("s1"), lease("sender"))).saga
    assert not (await write(store, Change("s1", Cancel()), lease("other"))).held
    answered = await write(store, Change("s1", Failed(call(saga), Problem("UNAVAILABLE"))), lease("other"))
    assert answered.saga.state is State.COMPENSATING
    assert answered.held
    assert not (await write(store, Change("s1", Sent(call(saga))), lease("sender"))).held
    assert await claim(store, lease("sender")) == []


async def test_an_answer_takes_no_saga_from_who_is_calling_a_method(store: DatabaseSagaStore) -> None:
    saga = (await write(store, order("s1"), lease("me"))).saga
    calling = await write(store, Change("s1", Succeeded(call(saga))), lease("me"))
    assert calling.held
    forged = await write(store, Change("s1", Succeeded(call(calling.saga))), lease("other"))
    assert not forged.held


async def test_what_is_written_together_is_applied_in_order_and_fails_alone(store: DatabaseSagaStore) -> None:
    first, second = await start(store, "s1"), await start(store, "s2")
    results = await store.write(
        [
            Change("s1", Sent(call(first))),
            order("s3", request="r1", digest="d"),
            Change("no", Tick()),
            Change("s1", Succeeded(call(first), 1)),
            order("s2"),
            Change("s2", Resume()),
            order(request="r1", digest="d"),
            Order("no", {}),
            Change("s2", Succeeded(call(second), 2)),
        ],
        lease("me"),
    )
    assert [type(each).__name__ for each in results] == [
        "Made",
        "Made",
        "NotFoundError",
        "Made",
        "AlreadyExistsError",
        "FailedPreconditionError",
        "Made",
        "NotFoundError",
        "Made",
    ]
    made = [each for each in results if isinstance(each, Made)]
    assert [each.saga.id for each in made] == ["s1", "s3", "s1", "s3", "s2"]
    assert [each.held for each in made] == [False, True, True, False, True]
    assert (await store.get("s1")).results == {"reserve": 1}
    assert (await store.get("s2")).results == {"reserve": 2}


async def test_a_text_that_the_database_refuses_is_the_fault_of_one(store: DatabaseSagaStore) -> None:
    results = await store.write([order("s1"), Order("a\0b", {}), order("s2")])
    assert isinstance(results[1], PlexusError)
    assert [saga.id for saga in await store.list_sagas(Which(), limit=MANY)] == ["s2", "s1"]


async def test_a_saga_that_cannot_be_driven_now_is_left_alone_for_a_while(store: DatabaseSagaStore) -> None:
    await start(store, "s1")
    await store.claim(lease("me"))
    await store.release(["s1"], "me", retry_s=60)
    assert await claim(store, lease("me")) == []
    assert await store.next_due_s(most=5) == 5


async def test_what_one_has_is_given_back_at_once(store: DatabaseSagaStore) -> None:
    for name in ("s1", "s2"):
        await write(store, order(name), lease("me"))
    await write(store, order("s3"), lease("other"))
    await store.release_all("me")
    assert sorted(await claim(store, lease("third"))) == ["s1", "s2"]


async def test_the_newest_revisions_are_told(store: DatabaseSagaStore) -> None:
    saga = await start(store, "s1")
    assert await store.revisions(["s1", "no"]) == {"s1": saga.revision}


async def test_a_history_forgets_its_oldest(
    store: DatabaseSagaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.queueing.sagas.writing.MAX_EVENTS", 20)
    saga = await start(store, "s1")
    while saga.revision < 30:
        saga = await change(store, "s1", Failed(call(saga), Problem("UNAVAILABLE")))
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
