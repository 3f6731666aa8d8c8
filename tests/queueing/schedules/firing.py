"""Schedules to fire, and what came of it."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from services.queueing.domain import Message
from services.queueing.resources import Subscription, Topic
from services.queueing.schedules.domain import Definition, RunState, Schedule
from services.queueing.schedules.timing import Every, Timing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.queueing.domain import Broker, Delivery
    from services.queueing.schedules.store import ScheduleStore

WITHIN_S = 120.0
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)


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


async def published(store: ScheduleStore, name: str) -> int:
    return sum(run.state is RunState.PUBLISHED for run in await store.runs(name, limit=100))


def iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
