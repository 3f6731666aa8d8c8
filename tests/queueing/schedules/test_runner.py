"""Firing: on a real broker, through outages, and once across replicas that are killed at any moment."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Message
from services.queueing.resources import Subscription, Topic
from services.queueing.schedules.domain import Definition, MissedRuns, RunState, Schedule
from services.queueing.schedules.runner import Runner
from services.queueing.schedules.store import ScheduleStore
from services.queueing.schedules.timing import At, Every, Timing
from services.queueing.state import Database
from services.runtime.errors import NotFoundError, UnavailableError
from tests.queueing.schedules.replica import PHASES, broker_of, runner_of
from tests.servers.postgres import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.queueing.domain import Broker, Delivery
    from tests.servers.rabbitmq import RabbitServer

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("schedules")]
WITHIN_S = 120.0
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
_PROGRAM = Path(__file__).with_name("replica.py")


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


async def prepare(broker: Broker) -> None:
    await broker.create_topic(Topic("jobs"))
    await broker.create_subscription(Subscription("work", "jobs", ack_deadline_s=3600))


def schedule(name: str, now: datetime, timing: Timing | None = None, **settings: Any) -> Schedule:
    message = Message(name.encode(), ordering_key=name)
    definition = Definition(timing or Timing(Every(MINUTE, now)), "jobs", message)
    made = Schedule(name, uuid.uuid4().hex, replace(definition, **settings), now, now)
    return made.from_now(now)


async def pulled(broker: Broker, count: int, found: list[Delivery] | None = None) -> list[Delivery]:
    """Messages in order of publishing, so many of them, those found before included."""
    found = [] if found is None else found
    async with asyncio.timeout(WITHIN_S):
        while len(found) < count:
            found += await broker.pull("work", max_messages=1000, max_bytes=10**8, wait_s=5)
    return found


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await condition():  # noqa: ASYNC110 - polls a database
            await asyncio.sleep(0.02)


def firings(deliveries: Sequence[Delivery]) -> Counter[tuple[str, str]]:
    """How often each time of each schedule was published."""
    return Counter(
        (each.message.attributes["plexus-schedule"], each.message.attributes["plexus-schedule-due"])
        for each in deliveries
    )


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


async def published(store: ScheduleStore, name: str) -> int:
    return sum(run.state is RunState.PUBLISHED for run in await store.runs(name, limit=100))


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
            await switch.open()
            found = await pulled(switch.broker, 5 * len(expected))

            async def done() -> bool:
                return all([(await store.get(f"s{number}")).firings == len(expected) for number in range(5)])

            await eventually(done)
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
        assert set(firings(await pulled(broker, 1))) == {("good", _iso(start + MINUTE))}

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
        assert set(firings(found)) == {("s", _iso(clock.now()))}
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


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# Replicas in processes of their own.


@asynccontextmanager
async def replica(
    state_url: str, broker: str, phase: str = "never"
) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(_PROGRAM), state_url, broker, phase]
    process = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == b"up\n"
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize(
    ("state_url", "phase"),
    [("sqlite", phase) for phase in PHASES]
    + [("postgresql", phase) for phase in ("before-published", "before-marked")],
    indirect=["state_url"],
)
async def test_a_replica_killed_at_any_moment_leaves_each_firing_stored_once(
    state_url: str, tmp_path: Path, phase: str
) -> None:
    file = str(tmp_path / "queue.sqlite")
    async with Database(state_url) as database, broker_of(file, database) as broker:
        store = ScheduleStore(database)
        await store.migrate()
        await prepare(broker)
        start = datetime.now(UTC)
        for number in range(20):
            once = schedule(f"s{number}", start, Timing(At(start + SECOND)), missed_runs=MissedRuns.ALL)
            await store.create(once, most=99)
        async with replica(state_url, file, phase) as dying:
            await asyncio.to_thread(dying.wait, WITHIN_S)
        async with runner_of(broker, database).running():

            async def done() -> bool:
                runs = [await store.runs(f"s{number}", limit=9) for number in range(20)]
                return all([run.state for run in found] == [RunState.PUBLISHED] for found in runs)

            await eventually(done)
        found = firings(await pulled(broker, 20))
        assert found == Counter((f"s{number}", _iso(start + SECOND)) for number in range(20))
        assert (await broker.stats("work")).ready == 0


async def replicas_share(state_url: str, spec: str) -> None:
    """Three replicas, one killed after the other while they fire; the last one finishes."""
    names, times = 25, 5
    async with Database(state_url) as database, broker_of(spec, database) as broker:
        store = ScheduleStore(database)
        await store.migrate()
        await prepare(broker)
        async with replica(state_url, spec) as first, replica(state_url, spec) as second:
            start = datetime.now(UTC)
            for number in range(names):
                settings = {"max_firings": times, "missed_runs": MissedRuns.ALL, "max_missed_runs": 1000}
                timing = Timing(Every(SECOND, start))
                await store.create(schedule(f"s{number}", start, timing, **settings), most=99)
            found = await pulled(broker, names)
            first.kill()
            await pulled(broker, 2 * names, found)
            second.kill()
            async with runner_of(broker, database).running():
                await pulled(broker, names * times, found)

                async def done() -> bool:
                    return [await published(store, f"s{n}") for n in range(names)] == [times] * names

                await eventually(done)
        assert (await broker.stats("work")).ready == 0
    expected = [
        (f"s{number}", _iso(start + n * SECOND)) for number in range(names) for n in range(1, times + 1)
    ]
    assert firings(found) == Counter(expected)


@pytest.mark.parametrize("state_url", ["postgresql"], indirect=True)
async def test_replicas_that_die_lose_nothing_and_repeat_nothing(state_url: str, tmp_path: Path) -> None:
    await replicas_share(state_url, str(tmp_path / "queue.sqlite"))


async def test_replicas_that_die_lose_nothing_and_repeat_nothing_on_rabbitmq(
    postgres: PostgresServer, rabbitmq: RabbitServer, rabbitmq_vhost: str
) -> None:
    with postgres.database() as url:
        await replicas_share(url, rabbitmq.url(rabbitmq_vhost))
