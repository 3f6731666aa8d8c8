"""Once across replicas in processes of their own, which are killed at any moment."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.queueing.schedules.domain import MissedRuns, RunState
from services.queueing.schedules.store import ScheduleStore
from services.queueing.schedules.timing import At, Every, Timing
from services.queueing.state import Database
from tests.queueing.schedules.firing import (
    SECOND,
    WITHIN_S,
    eventually,
    firings,
    iso,
    prepare,
    published,
    pulled,
    schedule,
)
from tests.queueing.schedules.replica import PHASES, broker_of, runner_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers.postgres import PostgresServer
    from tests.servers.rabbitmq import RabbitServer

pytestmark = [pytest.mark.timeout(400)]
_PROGRAM = Path(__file__).with_name("replica.py")


@asynccontextmanager
async def replica(
    state_url: str, broker: str, phase: str = "never", comes: str = "SIGKILL"
) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(_PROGRAM), state_url, broker, phase, comes]
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
        assert found == Counter((f"s{number}", iso(start + SECOND)) for number in range(20))
        assert (await broker.stats("work")).ready == 0


@pytest.mark.parametrize("phase", ["before-published", "after-published"])
@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
async def test_a_frozen_replica_that_goes_on_after_another_has_fired_fires_nothing_twice(
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
        async with replica(state_url, file, phase, "SIGSTOP") as frozen:
            await asyncio.to_thread(os.waitid, os.P_PID, frozen.pid, os.WSTOPPED)
            async with runner_of(broker, database).running():

                async def done() -> bool:
                    return [await published(store, f"s{number}") for number in range(20)] == [1] * 20

                await eventually(done)
            before = [await store.runs(f"s{number}", limit=9) for number in range(20)]
            frozen.send_signal(signal.SIGCONT)
            assert frozen.stdout is not None
            assert await asyncio.to_thread(frozen.stdout.readline) == b"on\n"
            # It has gone through its round, and marked what it thinks it fired, when it fires the next one.
            once = schedule("last", start, Timing(At(datetime.now(UTC))), missed_runs=MissedRuns.ALL)
            await store.create(once, most=99)
            await eventually(lambda: _fired(store, "last"))
        found = firings(await pulled(broker, 21))
        assert sorted(name for name, _ in found) == sorted(["last", *(f"s{number}" for number in range(20))])
        assert set(found.values()) == {1}
        assert (await broker.stats("work")).ready == 0
        assert [await store.runs(f"s{number}", limit=9) for number in range(20)] == before


async def _fired(store: ScheduleStore, name: str) -> bool:
    return await published(store, name) == 1


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
        (f"s{number}", iso(start + n * SECOND)) for number in range(names) for n in range(1, times + 1)
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
