"""Firing: on a real broker, and through outages of the broker and the database."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.resources import Topic
from services.queueing.schedules.domain import MissedRuns, RunState
from services.queueing.schedules.runner import Runner
from services.queueing.schedules.store import ScheduleStore
from services.queueing.schedules.timing import At, Timing
from services.queueing.state import Database
from services.runtime.errors import NotFoundError, UnavailableError
from tests.queueing.schedules.firing import (
    HOUR,
    MINUTE,
    SECOND,
    eventually,
    firings,
    iso,
    prepare,
    published,
    pulled,
    schedule,
)
from tests.servers.postgres import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from services.queueing.domain import Message


pytestmark = [pytest.mark.timeout(400)]


class Clock:
    """A clock that goes on only by hand, so that a slow machine is late for nothing."""

    def __init__(self) -> None:
        self._begin = float(int(time.time()))
        self.ahead = timedelta()

    def __call__(self) -> float:
        return self._begin + self.ahead.total_seconds()

    def now(self) -> datetime:
        return datetime.fromtimestamp(self(), UTC)


class Switch:
    """A broker that can be away: while it is, what callers reach is one that has been closed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.tries = 0
        self.broker = SqliteBroker(file)

    async def open(self) -> None:
        self.broker = SqliteBroker(self._file)
        await self.broker.__aenter__()

    async def close(self) -> None:
        await self.broker.__aexit__(None, None, None)

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        self.tries += 1
        return await self.broker.publish(topic, messages)


def lag_s() -> float | None:
    return REGISTRY.get_sample_value("plexus_schedule_lag_seconds")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(f"sqlite:///{tmp_path}/state.sqlite") as database:
        yield database


@pytest.fixture
async def store(database: Database) -> ScheduleStore:
    store = ScheduleStore(database)
    await store.migrate()
    return store


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[SqliteBroker]:
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        await prepare(broker)
        yield broker


def runner_on(broker: Any, database: Database, clock: Clock, *, poll_s: float = 3600) -> Runner:
    return Runner(broker, database, dedup_window_s=600, poll_s=poll_s, clock=clock)


async def test_what_is_due_is_published_in_order_and_nothing_else(
    broker: SqliteBroker, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    start = clock.now()
    for number in range(3):
        await store.create(schedule(f"s{number}", start), most=9)
    await store.create(schedule("later", start, Timing(At(start + HOUR))), most=9)
    runner = runner_on(broker, database, clock)
    async with runner.running():
        for minutes in (1, 2, 3):
            clock.ahead = minutes * MINUTE
            runner.changed()
            assert len(await pulled(broker, 3)) == 3

        async def told() -> bool:
            return await published(store, "s1") == 3

        await eventually(told)
    assert (await broker.stats("work")).ready == 0
    assert (await store.get("later")).firings == 0
    assert [run.number for run in await store.runs("s1", limit=9)] == [3, 2, 1]


async def test_a_sleeping_runner_looks_again_only_when_something_is_due(
    broker: SqliteBroker, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    runner = runner_on(broker, database, clock)
    assert await runner._step() == 3600
    await store.create(schedule("far", clock.now(), Timing(At(clock.now() + 9 * HOUR))), most=9)
    assert await runner._step() == 3600
    await store.create(schedule("near", clock.now(), Timing(At(clock.now() + HOUR / 2))), most=9)
    pause = await runner._step()
    assert pause is not None
    assert 60 < pause <= 1800


async def test_what_another_replica_was_told_is_noticed(
    broker: SqliteBroker, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    async with runner_on(broker, database, clock, poll_s=0.1).running():
        await store.create(schedule("s", clock.now()), most=9)
        clock.ahead = MINUTE
        assert len(await pulled(broker, 1)) == 1


@pytest.mark.parametrize(("policy", "expected"), [("skip", [60]), ("once", [60]), ("all", [*range(1, 61)])])
async def test_an_outage_of_the_broker_is_waited_for_and_then_made_up_as_each_schedule_wants(
    tmp_path: Path, database: Database, store: ScheduleStore, clock: Clock, policy: str, expected: list[int]
) -> None:
    switch = Switch(tmp_path / "queue.sqlite")
    await switch.open()
    await prepare(switch.broker)
    await switch.close()
    start = clock.now()
    for number in range(5):
        settings: dict[str, Any] = {"missed_runs": MissedRuns(policy), "max_missed_runs": 1000}
        await store.create(schedule(f"s{number}", start, **settings), most=9)
    runner = runner_on(switch, database, clock, poll_s=0.1)
    with capture_logs() as logs:
        async with runner.running():
            clock.ahead = MINUTE
            runner.changed()

            async def tried() -> bool:
                return switch.tries >= 3

            await eventually(tried)
            clock.ahead = HOUR + SECOND
            assert lag_s() == (HOUR + SECOND - MINUTE).total_seconds()
            await switch.open()
            found = await pulled(switch.broker, 5 * len(expected))

            async def done() -> bool:
                return all([(await store.get(f"s{number}")).firings == len(expected) for number in range(5)])

            await eventually(done)

            async def caught_up() -> bool:
                return lag_s() == 0

            await eventually(caught_up)
        await switch.close()
    dues = [(start + n * MINUTE).isoformat().replace("+00:00", "Z") for n in expected]
    assert firings(found) == Counter((f"s{number}", due) for number in range(5) for due in dues)
    for number in range(5):
        assert (await store.get(f"s{number}")).missed == 60 - len(expected)
    assert [log["event"] for log in logs if log["event"].startswith("schedules_")] == [
        "schedules_waiting",
        "schedules_going_on",
    ]


async def test_a_topic_that_is_gone_stops_its_own_schedules_only(
    broker: SqliteBroker, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    start = clock.now()
    await store.create(schedule("good", start), most=9)
    await store.create(schedule("bad", start, topic="gone"), most=9)
    runner = runner_on(broker, database, clock)
    async with runner.running():
        clock.ahead = MINUTE
        runner.changed()
        assert set(firings(await pulled(broker, 1))) == {("good", iso(start + MINUTE))}

        async def told() -> bool:
            return (await store.get("bad")).last_error != ""

        await eventually(told)
        (run,) = await store.runs("bad", limit=9)
        assert (run.state, run.error) == (RunState.FAILED, (await store.get("bad")).last_error)
        await broker.create_topic(Topic("gone"))
        clock.ahead = 2 * MINUTE
        runner.changed()

        async def mended() -> bool:
            return (await store.get("bad")).last_error == ""

        await eventually(mended)
    with pytest.raises(NotFoundError):
        await runner.run_now("nothing")


async def test_a_run_by_hand_that_fails_is_not_made_up_later(
    tmp_path: Path, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    switch = Switch(tmp_path / "queue.sqlite")
    await switch.open()
    await prepare(switch.broker)
    await switch.close()
    await store.create(schedule("s", clock.now()), most=9)
    runner = runner_on(switch, database, clock)
    with pytest.raises(UnavailableError):
        await runner.run_now("s")
    await switch.open()
    run = await runner.run_now("s")
    assert [found.state for found in await store.runs("s", limit=9)] == [RunState.PUBLISHED, RunState.FAILED]
    (delivery,) = await pulled(switch.broker, 1)
    assert delivery.message.message_id == run.message_id
    await switch.close()


async def test_an_outage_of_the_database_is_waited_for(
    postgres_program: Path, broker: SqliteBroker, clock: Clock
) -> None:
    with PostgresServer(postgres_program) as server, server.database() as url, capture_logs() as logs:
        async with Database(url, connect_s=20) as database:
            store = ScheduleStore(database)
            await store.migrate()
            await store.create(schedule("s", clock.now()), most=9)
            runner = runner_on(broker, database, clock, poll_s=0.1)
            async with runner.running():
                clock.ahead = MINUTE
                assert len(await pulled(broker, 1)) == 1
                server.kill()

                async def noticed() -> bool:
                    return any(log["event"] == "schedules_waiting" for log in logs)

                await eventually(noticed)
                clock.ahead = HOUR
                await asyncio.to_thread(server.start)
                found = await pulled(broker, 1)
        assert set(firings(found)) == {("s", iso(clock.now()))}
        assert (await broker.stats("work")).ready == 0


async def test_what_happened_is_counted(
    broker: SqliteBroker, database: Database, store: ScheduleStore, clock: Clock
) -> None:
    before = {name: count(name) for name in ("firings", "missed", "failures", "lateness")}
    await store.create(schedule("good", clock.now()), most=9)
    await store.create(schedule("bad", clock.now(), topic="gone", missed_runs=MissedRuns.SKIP), most=9)
    runner = runner_on(broker, database, clock)
    await runner.run_now("good")
    clock.ahead = 10 * MINUTE
    while await runner._step() == 0:
        pass
    assert {name: count(name) - before[name] for name in before} == {
        "firings": 2,  # by hand, and once for those that were missed
        "missed": 9 + 8,
        "failures": 2,  # of the last minute, the only two that are not missed
        "lateness": 1,
    }


def count(what: str) -> float:
    """What the metrics of schedules count."""
    suffix = "seconds_count" if what == "lateness" else "total"
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == f"plexus_schedule_{what}_{suffix}"
    )
