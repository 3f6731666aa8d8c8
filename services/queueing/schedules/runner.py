"""Fires schedules: sleeps until the earliest is due, and publishes what it has written down."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import Counter, Gauge, Histogram

from services.queueing.schedules.domain import Run, RunState
from services.queueing.schedules.ledger import Ledger, Outcome
from services.runtime.errors import (
    AbortedError,
    DeadlineExceededError,
    NotFoundError,
    PlexusError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from services.queueing.domain import Broker
    from services.queueing.schedules.domain import Firing
    from services.queueing.state import Database

log = structlog.get_logger(__name__)

FIRED = Counter("plexus_schedule_firings_total", "Messages published by schedules.", ["trigger"])
MISSED = Counter("plexus_schedule_missed_total", "Times of schedules that were missed and not made up.")
FAILED = Counter("plexus_schedule_failures_total", "Firings that were given up because of an error.")
LATENESS = Histogram(
    "plexus_schedule_lateness_seconds",
    "From when a schedule was to fire until its message was stored.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
LAG = Gauge(
    "plexus_schedule_lag_seconds", "For how long the earliest firing is due and not published; 0 if none is."
)

LEASE_S = 30.0
"""For how long a firing belongs to the replica that publishes it, at most."""
_CLOSE_S = 5.0
_BATCH = 500
_BATCH_BYTES = 4 * 1024 * 1024
_PUBLISHING = 16
"""Batches, of different topics, that are published at once."""
_BUSY_S = 0.05
"""Pause while another replica has what is due."""
_RETRY_S = 0.5
_MAX_RETRY_S = 10.0
_UNEVEN_RETRY = timedelta(seconds=5)
"""When only some of the batches failed: theirs are tried again after this."""
_PASSING = (UnavailableError, ResourceExhaustedError, DeadlineExceededError, AbortedError, TimeoutError)


@dataclass(slots=True)
class _Round:
    """What became of the firings of one round."""

    outcomes: list[Outcome] = field(default_factory=list)
    held: list[Firing] = field(default_factory=list)
    reason: str = ""


class Runner:
    """Publishes what is due, beside any number of others on the same database.

    While the broker does not take messages, it tries with one firing at a time; what was due meanwhile is
    then up to each schedule's policy for missed firings.
    """

    def __init__(
        self,
        broker: Broker,
        database: Database,
        *,
        dedup_window_s: float,
        poll_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Set it up.

        Args:
            broker: Takes the messages.
            database: Of the state, migrated.
            dedup_window_s: How long the broker remembers deduplication ids.
            poll_s: Within this the changes of other replicas, and of the clock, are noticed.
            clock: Seconds since 1970.
        """
        # An owner that dies while it publishes is repeated well within the window.
        self._lease_s = min(LEASE_S, dedup_window_s / 4)
        self._broker = broker
        self._ledger = Ledger(database, uuid.uuid4().hex, timedelta(seconds=self._lease_s))
        self._poll_s = poll_s
        self._clock = clock
        self._news = asyncio.Event()
        self._stopped = asyncio.Event()
        self._away = False
        self._failures = 0
        self._next: datetime | None = None

    def _lag_s(self) -> float:
        return 0.0 if self._next is None else max(0.0, (self.now() - self._next).total_seconds())

    def now(self) -> datetime:
        """The time by its clock."""
        return datetime.fromtimestamp(self._clock(), UTC)

    def changed(self) -> None:
        """Look at the schedules: one has changed."""
        self._news.set()

    def stop(self) -> None:
        """Let `run` return when it has finished what it publishes."""
        self._stopped.set()
        self._news.set()

    @asynccontextmanager
    async def running(
        self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]] = asyncio.create_task
    ) -> AsyncIterator[None]:
        """Fire schedules for the time of the context; `spawn` says who hears of a crash."""
        LAG.set_function(self._lag_s)
        task = spawn(self.run())
        try:
            yield
        finally:
            self.stop()
            done, _ = await asyncio.wait([task], timeout=_CLOSE_S)
            if not done:
                task.cancel()
                await asyncio.wait([task])

    async def run(self) -> None:
        """Fire schedules until stopped."""
        while not self._stopped.is_set():
            self._news.clear()
            try:
                pause_s = await self._step()
            except _PASSING as error:
                self._failed("state", _reason(error))
                pause_s = None
            if pause_s is None:
                await self._wait(self._stopped, self._backoff_s())
            else:
                await self._wait(self._news, pause_s)

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return

    def _failed(self, dependency: str, reason: str) -> None:
        if not self._failures:
            log.warning("schedules_waiting", dependency=dependency, reason=reason)
        self._failures += 1

    def _backoff_s(self) -> float:
        bound = min(_MAX_RETRY_S, _RETRY_S * 2.0 ** min(self._failures - 1, 10))
        return bound * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load only

    async def _step(self) -> float | None:
        """Do what is due.

        Returns:
            How long to sleep then, in seconds; None for a while, whatever happens, after a failure.
        """
        now = self.now()
        earliest = await self._ledger.earliest()
        if not self._away:
            self._next = earliest
        if earliest is None or earliest > now:
            self._going_on(published=False)
            return await self._idle_s(now, earliest)
        limit = 1 if self._away else _BATCH
        found = await self._ledger.take_over(now, limit=limit)
        if not (self._away and found.firings):
            found = found.and_also(await self._ledger.decide(now, limit=limit))
        for name, count in found.missed.items():
            MISSED.inc(count)
            log.warning("schedule_missed", schedule=name, count=count)
        for name, why in found.unreadable.items():
            log.error("schedule_unreadable", schedule=name, error=why)
        if found.firings and not await self._publish(found.firings):
            return None
        self._going_on(published=bool(found.firings))
        return _BUSY_S if found.is_empty else 0.0

    def _going_on(self, *, published: bool) -> None:
        """Forget failures: the database answers, and so did the broker unless nothing has tried it since."""
        if self._failures and (published or not self._away):
            self._failures, self._away = 0, False
            log.info("schedules_going_on")

    async def _idle_s(self, now: datetime, earliest: datetime | None) -> float:
        """How long nothing is due, as far as this replica knows."""
        if count := await self._ledger.set_back(now, limit=_BATCH):
            log.warning("schedules_set_back", count=count)
            return 0.0
        if earliest is None:
            return self._poll_s
        return max(0.0, min(self._poll_s, (earliest - self.now()).total_seconds()))

    async def _publish(self, firings: Sequence[Firing]) -> bool:
        """Publish and mark; whether the broker took anything."""
        done = _Round()
        self._next = min([firing.fires for firing in firings] + ([self._next] if self._next else []))
        slots = asyncio.Semaphore(_PUBLISHING)
        deadline = asyncio.get_running_loop().time() + self._lease_s * 2 / 3
        async with asyncio.TaskGroup() as group:
            for batch in _batches(firings):
                group.create_task(self._send(batch, done, slots, deadline))
        now = self.now()
        await self._ledger.finish(done.outcomes, now)
        for outcome in done.outcomes:
            self._tell(outcome, now)
        if not done.held:
            self._next = None
            return True
        await self._ledger.give_back(done.held, now + _UNEVEN_RETRY if done.outcomes else now)
        if done.outcomes:
            return True
        self._away = True
        self._failed("broker", done.reason)
        return False

    async def _send(
        self, batch: Sequence[Firing], done: _Round, slots: asyncio.Semaphore, deadline: float
    ) -> None:
        try:
            async with asyncio.timeout_at(deadline), slots:
                messages = [firing.published_as() for firing in batch]
                ids = await self._broker.publish(batch[0].topic, messages)
        except _PASSING as error:
            done.held.extend(batch)
            done.reason = _reason(error)
        except PlexusError as error:
            if len(batch) == 1 or isinstance(error, NotFoundError):
                done.outcomes.extend(Outcome(firing, error=error.message) for firing in batch)
                return
            for firing in batch:  # one of them is at fault
                await self._send([firing], done, slots, deadline)
        else:
            done.outcomes.extend(map(Outcome, batch, ids))

    @staticmethod
    def _tell(outcome: Outcome, now: datetime) -> None:
        firing = outcome.firing
        if outcome.error:
            FAILED.inc()
            log.warning("schedule_failed", schedule=firing.name, run=firing.run.number, error=outcome.error)
            return
        FIRED.labels("manual" if firing.run.manual else "schedule").inc()
        if not firing.run.manual:
            LATENESS.observe(max(0.0, (now - firing.fires).total_seconds()))

    async def run_now(self, name: str) -> Run:
        """Publish a schedule's message whatever its time; durable when it returns.

        Returns:
            The run, finished.

        Raises:
            PlexusError: It was not published, or not known to be in time; the run says so too.
        """
        firing = await self._ledger.begin(name, self.now())
        try:
            async with asyncio.timeout(self._lease_s * 2 / 3):
                (message_id,) = await self._broker.publish(firing.topic, [firing.published_as()])
        except (PlexusError, TimeoutError) as error:
            failure = error if isinstance(error, PlexusError) else _late()
            await self._end(Outcome(firing, error=failure.message))
            raise failure from error
        return await self._end(Outcome(firing, message_id))

    async def _end(self, outcome: Outcome) -> Run:
        now = self.now()
        await self._ledger.finish([outcome], now)
        self._tell(outcome, now)
        state = RunState.FAILED if outcome.error else RunState.PUBLISHED
        return replace(outcome.firing.run, state=state, ended=now, message_id=outcome.message_id)


def _late() -> DeadlineExceededError:
    return DeadlineExceededError("the broker did not confirm the message in time")


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, PlexusError) else type(error).__name__


def _batches(firings: Sequence[Firing]) -> Iterator[list[Firing]]:
    """Firings by topic, in order, as many at once as a broker takes well."""
    topics: dict[str, list[Firing]] = {}
    for firing in firings:
        topics.setdefault(firing.topic, []).append(firing)
    for of_topic in topics.values():
        batch: list[Firing] = []
        size = 0
        for firing in of_topic:
            size += len(firing.message.data)
            if batch and (len(batch) == _BATCH or size > _BATCH_BYTES):
                yield batch
                batch, size = [], len(firing.message.data)
            batch.append(firing)
        yield batch
