"""The store and the ledger of schedules, on both databases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from plexus.queueing.v1 import schedules_pb2 as pb
from services.queueing.domain import Message
from services.queueing.resources import Backoff, Priority, RetryPolicy
from services.queueing.schedules.domain import (
    HISTORY,
    Definition,
    Firing,
    MissedRuns,
    RunState,
    Schedule,
    State,
)
from services.queueing.schedules.ledger import CLOCK_STEP, Ledger, Outcome
from services.queueing.schedules.store import ScheduleStore
from services.queueing.schedules.tables import METADATA, SCHEDULES
from services.queueing.schedules.timing import At, Cron, Every, Timing
from services.runtime.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from services.queueing.state import Database

pytestmark = [pytest.mark.timeout(400)]  # the first test starts the server
START = datetime(2026, 6, 1, tzinfo=UTC)
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
LEASE = timedelta(seconds=30)


def schedule(name: str = "s", timing: Timing | None = None, **settings: Any) -> Schedule:
    definition = Definition(timing or Timing(Every(MINUTE, START)), "jobs", Message(b"x"), **settings)
    return Schedule(name, f"uid-{name}", definition, START, START).from_now(START)


@pytest.fixture
async def store(state: Database) -> ScheduleStore:
    store = ScheduleStore(state)
    await store.migrate()
    return store


@pytest.fixture
def one(state: Database) -> Ledger:
    return Ledger(state, "one", LEASE)


@pytest.fixture
def two(state: Database) -> Ledger:
    return Ledger(state, "two", LEASE)


def numbers(firings: list[Firing]) -> list[tuple[str, int]]:
    return sorted((firing.name, firing.run.number) for firing in firings)


async def test_a_schedule_is_kept_in_all_its_parts(store: ScheduleStore) -> None:
    message = Message(
        b"\0data",
        {"k": "v"},
        ordering_key="o",
        priority=Priority.HIGH,
        ttl_s=5.5,
        correlation_id="c",
        delay_s=1.0,
        retry=RetryPolicy(Backoff.FIXED, 1, 2, 3),
    )
    every: tuple[Cron | At | Every, ...] = (
        Cron("*/5 * * * *", "Europe/Berlin"),
        At(START + MINUTE),
        Every(SECOND * 1.5, START),
    )
    for number, times in enumerate(every):
        timing = Timing(times, jitter=SECOND / 4, start=START, end=START + timedelta(days=9))
        definition = Definition(timing, "jobs", message, MissedRuns.ALL, 7, 99)
        made = Schedule(f"s{number}", f"uid{number}", definition, START, START, paused=True)
        await store.create(made, most=100)
        assert await store.get(made.name) == made


async def test_the_steps_lead_to_the_tables(store: ScheduleStore, state: Database) -> None:
    def differences(connection: Connection) -> list[Any]:
        options = {"include_name": lambda name, kind, _: kind != "table" or name in METADATA.tables}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))

    await store.migrate()  # again, as a second replica does
    async with state.reading() as connection:
        assert await connection.run_sync(differences) == []


async def test_names_are_unique_and_schedules_bounded(store: ScheduleStore) -> None:
    await store.create(schedule("a"), most=2)
    with pytest.raises(AlreadyExistsError):
        await store.create(replace(schedule("a"), uid="other"), most=2)
    await store.create(schedule("b"), most=2)
    with pytest.raises(ResourceExhaustedError) as caught:
        await store.create(schedule("c"), most=2)
    assert caught.value.reason == "TOO_MANY_SCHEDULES"
    for call in (store.get("c"), store.delete("c"), store.runs("c", limit=1), store.change("c", lambda s: s)):
        with pytest.raises(NotFoundError):
            await call


async def test_schedules_are_listed_by_name_topic_and_state(store: ScheduleStore, one: Ledger) -> None:
    await store.create(schedule("active"), most=9)
    other = schedule("other")
    await store.create(replace(other, definition=replace(other.definition, topic="more")), most=9)
    await store.create(replace(schedule("paused"), paused=True, next_due=None), most=9)
    await store.create(schedule("spent", Timing(At(START + SECOND))), most=9)
    await one.decide(START + SECOND, limit=9)

    async def names(**settings: Any) -> list[str]:
        return [found.name for found in await store.schedules(**{"limit": 9, **settings})]

    assert await names() == ["active", "other", "paused", "spent"]
    assert await names(limit=2, after="active") == ["other", "paused"]
    assert await names(topic="more") == ["other"]
    assert await names(state=State.ACTIVE) == ["active", "other"]
    assert await names(state=State.PAUSED) == ["paused"]
    assert await names(state=State.COMPLETED) == ["spent"]


async def test_a_time_is_decided_once_and_published_once(
    store: ScheduleStore, one: Ledger, two: Ledger
) -> None:
    for number in range(40):
        await store.create(schedule(f"s{number}"), most=99)
    now = START + MINUTE
    assert await one.earliest() == now
    found = await asyncio.gather(*(ledger.decide(now, limit=15) for ledger in (one, two) for _ in range(8)))
    firings = [firing for decided in found for firing in decided.firings]
    assert numbers(firings) == sorted((f"s{number}", 1) for number in range(40))
    await one.finish([Outcome(firing, "m1") for firing in firings], now)
    (run,) = await store.runs("s7", limit=9)
    assert (run.state, run.message_id, run.due, run.ended) == (RunState.PUBLISHED, "m1", now, now)
    done = await store.get("s7")
    assert (done.firings, done.last_fired, done.next_due) == (1, now, START + 2 * MINUTE)
    assert await two.earliest() == START + 2 * MINUTE


async def test_what_its_owner_does_not_publish_goes_to_another(
    store: ScheduleStore, one: Ledger, two: Ledger
) -> None:
    await store.create(schedule(), most=9)
    now = START + MINUTE
    (firing,) = (await one.decide(now, limit=9)).firings
    assert (await two.take_over(now + LEASE - SECOND, limit=9)).firings == []
    assert await two.earliest() == now + LEASE
    (again,) = (await two.take_over(now + LEASE, limit=9)).firings
    assert again.published_as() == firing.published_as()
    assert (await one.take_over(now + LEASE, limit=9)).firings == []
    await two.finish([Outcome(again, "m")], now + LEASE)
    await one.finish([Outcome(firing, "late")], now + LEASE)  # it was only slow: nothing changes
    assert [run.message_id for run in await store.runs("s", limit=9)] == ["m"]


async def test_what_is_given_back_is_anybodys_at_once(store: ScheduleStore, one: Ledger, two: Ledger) -> None:
    await store.create(schedule(), most=9)
    now = START + MINUTE
    firings = (await one.decide(now, limit=9)).firings
    await two.give_back(firings, now)  # not its own
    assert (await two.take_over(now, limit=9)).firings == []
    await one.give_back(firings, now)
    assert numbers((await two.take_over(now, limit=9)).firings) == [("s", 1)]


async def test_what_was_given_back_and_is_late_follows_the_policy(store: ScheduleStore, one: Ledger) -> None:
    for policy in MissedRuns:
        await store.create(schedule(policy.value, missed_runs=policy), most=9)
    firings = (await one.decide(START + MINUTE, limit=9)).firings
    await one.give_back(firings, START + MINUTE)
    taken = await one.take_over(START + 10 * MINUTE, limit=9)
    assert numbers(taken.firings) == [("all", 1)]
    assert taken.missed == {"skip": 1, "once": 1}
    once = await store.get("once")
    assert (once.firings, once.missed) == (0, 1)
    assert [run.state for run in await store.runs("once", limit=9)] == [RunState.MISSED]
    decided = await one.decide(START + 10 * MINUTE, limit=9)
    assert [firing.run.due for firing in decided.firings if firing.name == "once"] == [START + 10 * MINUTE]


async def test_a_change_leaves_what_is_being_published_as_it_was(store: ScheduleStore, one: Ledger) -> None:
    await store.create(schedule(), most=9)
    now = START + MINUTE
    (firing,) = (await one.decide(now, limit=9)).firings
    for body in (b"y", b"z"):
        changed = await store.change(
            "s",
            lambda s, body=body: replace(s, definition=replace(s.definition, message=Message(body))),  # type: ignore[misc]  # bound now
        )
    assert changed.revision == 3
    assert changed == await store.get("s")
    assert await store.change("s", lambda s: s) == changed
    (again,) = (await one.take_over(now + LEASE, limit=9)).firings
    assert again.published_as() == firing.published_as()
    (following,) = (await one.decide(now + MINUTE, limit=9)).firings
    assert following.message.data == b"z"


async def test_a_deleted_schedule_publishes_nothing_more(store: ScheduleStore, one: Ledger) -> None:
    await store.create(schedule(), most=9)
    firings = (await one.decide(START + MINUTE, limit=9)).firings
    await store.delete("s")
    assert (await one.take_over(START + 5 * MINUTE, limit=9)).firings == []
    await one.finish([Outcome(firing, "m") for firing in firings], START)
    assert await one.earliest() is None
    await store.create(schedule(), most=9)
    assert await store.runs("s", limit=9) == []


async def test_runs_by_hand_count_apart(store: ScheduleStore, one: Ledger) -> None:
    await store.create(replace(schedule(), paused=True, next_due=None), most=9)
    firing = await one.begin("s", START + SECOND)
    assert firing.fires == START + SECOND
    await one.finish([Outcome(firing, error="no topic")], START + SECOND)
    found = await store.get("s")
    assert (found.firings, found.runs, found.last_error, found.last_fired) == (0, 1, "no topic", None)
    second = await one.begin("s", START + MINUTE)
    (taken,) = (await one.take_over(START + timedelta(days=1), limit=9)).firings
    assert taken.published_as() == second.published_as()
    await one.finish([Outcome(taken, "m")], START + MINUTE)
    assert (await store.get("s")).last_error == ""
    assert [(run.number, run.manual, run.state) for run in await store.runs("s", limit=9)] == [
        (2, True, RunState.PUBLISHED),
        (1, True, RunState.FAILED),
    ]
    with pytest.raises(NotFoundError):
        await one.begin("nothing", START)


async def test_the_history_is_bounded_and_paged(store: ScheduleStore, one: Ledger) -> None:
    await store.create(schedule(missed_runs=MissedRuns.ALL, max_missed_runs=1000), most=9)
    now = START + 250 * MINUTE
    while firings := (await one.decide(now, limit=9)).firings:
        await one.finish([Outcome(firing, "m") for firing in firings], now)
    runs = await store.runs("s", limit=1000)
    assert [run.number for run in runs] == list(range(250, 250 - HISTORY, -1))
    assert await store.runs("s", limit=3, before=runs[9].number) == runs[10:13]


async def test_a_clock_far_in_the_future_is_forgotten_when_it_comes_back(
    store: ScheduleStore, one: Ledger
) -> None:
    await store.create(schedule(), most=9)
    (early,) = (await one.decide(START + timedelta(days=1000), limit=9)).firings
    await one.finish([Outcome(early, "m")], START)
    near = START + timedelta(days=1000) - CLOCK_STEP
    assert await one.set_back(near, limit=9) == 0
    now = START + 90 * SECOND
    assert await one.set_back(now, limit=9) == 1
    assert await one.set_back(now, limit=9) == 0
    (firing,) = (await one.decide(START + 2 * MINUTE, limit=9)).firings
    assert firing.run.due == START + 2 * MINUTE
    assert firing.published_as().dedup_id != early.published_as().dedup_id


async def test_a_schedule_that_cannot_be_read_stops_alone(
    store: ScheduleStore, one: Ledger, state: Database
) -> None:
    for name in ("bad", "good"):
        await store.create(schedule(name), most=9)
    definition = pb.Schedule(topic="jobs", cron=pb.Cron(expression="@daily", time_zone="Gone/Away"))
    async with state.transaction() as connection:
        column = {"definition": definition.SerializeToString()}
        await connection.execute(update(SCHEDULES).where(SCHEDULES.c.name == "bad").values(column))
    decided = await one.decide(START + MINUTE, limit=9)
    assert numbers(decided.firings) == [("good", 1)]
    assert "Gone/Away" in decided.unreadable["bad"]
    assert (await one.decide(START + MINUTE, limit=9)).is_empty
