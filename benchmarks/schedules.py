"""Schedules that are all due in the same second: how soon each of their messages is stored.

    python benchmarks/schedules.py [--count 10000] [--state postgresql://…]

Both the schedules and the messages are in SQLite files, every commit waiting for the disk, unless a
PostgreSQL is named for the schedules. The last line is JSON: schedules, stored, seconds (from the due time
until the last message was stored), p50_ms and p99_ms (of each message), cpu_s (of this process meanwhile,
consumer included), idle_cpu (share of a core while all of them wait).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import insert

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Message
from services.queueing.resources import Subscription, Topic
from services.queueing.schedules.domain import Definition, Schedule
from services.queueing.schedules.runner import Runner
from services.queueing.schedules.store import ScheduleStore
from services.queueing.schedules.tables import SCHEDULES, columns
from services.queueing.schedules.timing import Cron, Timing
from services.queueing.state import Database
from services.runtime.config import TelemetryConfig
from services.runtime.telemetry import configure_logging

IDLE_S = 3.0
AHEAD = timedelta(minutes=10)


async def measure(count: int, state: str, folder: Path) -> dict[str, float]:
    """Make the schedules, let them wait, then set the clock to their time."""
    ahead = timedelta()
    async with Database(state) as database, SqliteBroker(folder / "queue.sqlite") as broker:
        store = ScheduleStore(database)
        await store.migrate()
        await broker.create_topic(Topic("jobs"))
        await broker.create_subscription(Subscription("work", "jobs"))
        now = datetime.now(UTC)
        due = (now + AHEAD).replace(microsecond=0)
        timing = Timing(Cron(f"{due.second} {due.minute} {due.hour} * * *", "UTC"))
        rows = []
        for number in range(count):
            definition = Definition(timing, "jobs", Message(b"x" * 256, {"number": str(number)}))
            rows.append(columns(Schedule(f"s{number}", f"u{number}", definition, now, now).from_now(now)))
        async with database.transaction() as connection:  # as store.create, in one go
            await connection.execute(insert(SCHEDULES), rows)
        runner = Runner(
            broker, database, dedup_window_s=600, poll_s=5, clock=lambda: time.time() + ahead.total_seconds()
        )
        async with runner.running():
            before = time.process_time()
            await asyncio.sleep(IDLE_S)
            idle = (time.process_time() - before) / IDLE_S
            ahead = due - datetime.now(UTC)
            began, cpu = time.time(), time.process_time()
            runner.changed()
            stored: dict[str, float] = {}
            while len(stored) < count:
                pulled = await broker.pull("work", max_messages=1000, max_bytes=10**8, wait_s=30)
                for delivery in pulled:
                    name = delivery.message.attributes["number"]
                    assert name not in stored, f"{name} was published twice"
                    stored[name] = delivery.message.published - began
                await broker.acknowledge("work", [delivery.ack_id for delivery in pulled])
            cpu = time.process_time() - cpu
    lateness = sorted(stored.values())
    return {
        "schedules": count,
        "stored": len(stored),
        "seconds": round(lateness[-1], 2),
        "p50_ms": round(lateness[count // 2] * 1000),
        "p99_ms": round(lateness[count * 99 // 100] * 1000),
        "cpu_s": round(cpu, 2),
        "idle_cpu": round(idle, 4),
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", default="", help="database of the schedules")
    parser.add_argument("--count", type=int, default=10_000, help="schedules")
    given = parser.parse_args()
    configure_logging("bench", TelemetryConfig(log_level="error"))
    with tempfile.TemporaryDirectory() as folder:
        state = given.state or f"sqlite:///{folder}/state.sqlite"
        print(json.dumps(asyncio.run(measure(given.count, state, Path(folder)))))


if __name__ == "__main__":
    main()
