"""The embedded Broker."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self

from services.queueing.backends.sqlite.catalogue import Catalogue
from services.queueing.backends.sqlite.database import Database
from services.queueing.backends.sqlite.dead_letters import DeadLetters, Part
from services.queueing.backends.sqlite.deliveries import Deliveries, count
from services.queueing.backends.sqlite.events import EventLog, event
from services.queueing.backends.sqlite.messages import Messages
from services.queueing.backends.sqlite.retained import Retained
from services.queueing.backends.sqlite.snapshots import Snapshots
from services.queueing.domain import (
    MAX_BATCH,
    Delivery,
    Levels,
    Message,
    Refusal,
    Stats,
    check_messages,
    check_refusals,
)
from services.queueing.exclusive import Holders
from services.queueing.kept import DeadLetter, DeadLetterStats, Event, Events, Position, Redrive, Where
from services.queueing.resources import MAX_LEASE_S, Snapshot, Subscription, Topic
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path
    from types import TracebackType

_WAIT_BOUND_S = 60.0
_REPLAY = 20
"""Events that are in memory at once."""
_PARTS = 10
"""Times so many are delivered again while all else waits."""


class SqliteBroker:
    """A Broker in one file; open it with `async with`.

    Nothing polls: a puller sleeps until the earliest due time or the next publish.
    """

    def __init__(
        self,
        file: Path,
        *,
        dedup_window_s: float = 600.0,
        max_waiting_writes: int = 20_000,
        full_sync: bool = True,
        used: Callable[[str], None] | None = None,
    ) -> None:
        """Open the file, made if need be.

        Args:
            file: The database.
            dedup_window_s: How long deduplication ids are remembered.
            max_waiting_writes: Calls that may wait for the disk.
            full_sync: Whether what is acknowledged survives the loss of power too.
            used: Told the name of each subscription that is used.
        """
        self._used = used or (lambda _name: None)
        self._database = Database(file, max_waiting=max_waiting_writes, full_sync=full_sync)
        self._catalogue = Catalogue(self._database)
        self._holders = Holders()
        self._events = EventLog(self._database, self._catalogue)
        self._snapshots = Snapshots(self._database, self._catalogue)
        self._retained = Retained(self._database, self._snapshots)
        self._messages = Messages(
            self._database, self._catalogue, self._events, self._snapshots, self._retained, dedup_window_s
        )
        self._dead = DeadLetters(self._database, self._catalogue, self._messages)
        self._deliveries = Deliveries(self._database, self._catalogue, self._messages, self._dead)
        self._giving_back: set[asyncio.Task[list[str]]] = set()

    async def __aenter__(self) -> Self:
        """Start the writer."""
        await self._database.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what was taken and close."""
        await self._database.__aexit__(kind, error, trace)

    # Topics and subscriptions.

    async def create_topic(self, topic: Topic) -> Topic:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.create_topic(topic))

    async def get_topic(self, name: str) -> Topic:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.topic(name))

    async def update_topic(self, topic: Topic) -> Topic:
        """See Broker."""

        def job() -> Topic:
            changed = self._catalogue.update_topic(topic)
            self._events.forget()
            if changed.log:
                self._events.prune(changed)
            return changed

        return await self._database.run(job)

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.topics(limit, after))

    async def delete_topic(self, name: str) -> None:
        """See Broker."""

        def job() -> None:
            self._catalogue.delete_topic(name)
            self._events.forget()

        await self._database.run(job)

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.create_subscription(subscription))

    async def get_subscription(self, name: str) -> Subscription:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.subscription(name))

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        self._used(subscription.name)

        def job() -> Subscription:
            changed = self._catalogue.update_subscription(subscription)
            if changed.detached:
                self._messages.drop_all(changed.name)
            if changed.detached or not changed.retain_acked:
                self._retained.release(changed.name)
            self._database.touched.add(changed.name)
            return changed

        return await self._database.run(job)

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """See Broker."""
        return await self._database.run(lambda: self._catalogue.subscriptions(topic, limit, after))

    async def delete_subscription(self, name: str) -> None:
        """See Broker."""

        def job() -> None:
            self._catalogue.subscription(name)
            self._messages.drop_all(name)
            self._retained.release(name)
            self._dead.purge(name, Where())
            self._catalogue.delete_subscription(name)
            self._database.touched.add(name)

        subscription = await self.get_subscription(name)
        if not subscription.ordered:  # a part of a key's messages would be waited for, were this interrupted
            last = await self._database.run(self._messages.last)
            while await self._database.run(lambda: self._messages.drop_part(name, last)):
                pass
        await self._database.run(job)

    async def subscribers(self, topic: str) -> list[Subscription]:
        """See Broker."""
        return await self._database.run(lambda: list(self._catalogue.subscribers(topic)))

    # Messages.

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """See Broker."""
        check_messages(messages)
        return await self._database.run(lambda: self._messages.publish(topic, messages))

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """See Broker."""
        if not 1 <= max_messages <= MAX_BATCH:
            raise InvalidArgumentError(f"must be 1 to {MAX_BATCH}", field="max_messages")
        deadline = time.monotonic() + min(wait_s, _WAIT_BOUND_S)
        while True:
            self._used(subscription)
            news = self._database.news(subscription)
            deliveries, earliest = await self._lease(subscription, max_messages, max_bytes)
            left = deadline - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            pause = left if earliest is None else min(left, max(0.0, earliest - time.time()))
            try:
                async with asyncio.timeout(pause):
                    await news.wait()
            except TimeoutError:
                continue  # something is due, or the wait is over

    async def _lease(
        self, subscription: str, max_messages: int, max_bytes: int
    ) -> tuple[list[Delivery], float | None]:
        leased: list[Delivery] = []

        def job() -> tuple[list[Delivery], float | None]:
            deliveries, earliest = self._deliveries.lease(subscription, max_messages, max_bytes)
            leased[:] = deliveries
            return deliveries, earliest

        try:
            return await self._database.run(job)
        except asyncio.CancelledError:
            # The job is done all the same, and nobody would have what it leased. Jobs run in order, so the
            # next one knows.
            back = asyncio.create_task(
                self._database.run(
                    lambda: self._deliveries.extend(subscription, [(each.ack_id, 0.0) for each in leased])
                )
            )
            self._giving_back.add(back)
            back.add_done_callback(self._given_back)
            raise

    def _given_back(self, task: asyncio.Task[list[str]]) -> None:
        self._giving_back.discard(task)
        if not task.cancelled():
            task.exception()  # closed meanwhile, or deleted: the lease ends by itself

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        return await self._database.run(lambda: self._deliveries.acknowledge(subscription, ack_ids))

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        check_refusals(refusals)
        return await self._database.run(lambda: self._deliveries.nack(subscription, refusals))

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        if not all(0 <= seconds <= MAX_LEASE_S for _, seconds in leases):
            raise InvalidArgumentError("must be 0 to 1 h", field="deadline")
        return await self._database.run(lambda: self._deliveries.extend(subscription, leases))

    @asynccontextmanager
    async def hold(self, subscription: str) -> AsyncIterator[None]:
        """See Broker."""
        with self._holders.hold(subscription):
            yield

    async def stats(self, subscription: str) -> Stats:
        """See Broker."""

        def job() -> Stats:
            now = time.time()
            self._deliveries.sweep(self._catalogue.subscription(subscription), now)
            return self._deliveries.stats(subscription, now)

        return await self._database.run(job)

    async def levels(self, *, limit: int) -> Levels:
        """See Broker; on a connection of its own, beside the writer."""
        found = await self.list_subscriptions(limit=limit + 1)
        names = [subscription.name for subscription in found]
        return await asyncio.to_thread(self._database.beside, lambda db: _levels(db, names, limit))

    # Dead letters.

    async def list_dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int = 0
    ) -> list[DeadLetter]:
        """See Broker."""

        def job() -> list[DeadLetter]:
            self._deliveries.sweep(self._catalogue.subscription(subscription), time.time())
            return self._dead.read(subscription, where, limit, after)

        return await self._database.run(job)

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """See Broker."""

        def job() -> DeadLetterStats:
            self._deliveries.sweep(self._catalogue.subscription(subscription), time.time())
            return self._dead.stats(subscription)

        return await self._database.run(job)

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """See Broker."""
        self._used(subscription)
        last = await self._database.run(lambda: self._dead.last(subscription))
        part = Part(last, time.time())
        while not part.ended:
            part = await self._database.run(partial(self._dead.redrive, subscription, where, how, part))
        return part.done

    async def purge(self, subscription: str, where: Where) -> int:
        """See Broker."""
        self._used(subscription)
        return await self._database.run(lambda: self._dead.purge(subscription, where))

    # Logs.

    async def list_events(self, topic: str, events: Events, *, limit: int) -> list[Event]:
        """See Broker."""
        return await self._database.run(
            lambda: [event(row) for row in self._events.rows(topic, events, limit)]
        )

    async def replay(self, topic: str, events: Events, subscription: str) -> int:
        """See Broker."""
        self._used(subscription)
        done, goes_on = 0, True
        last = await self._database.run(lambda: self._events.last(topic))
        while goes_on:  # a job for each part, so that others come in between
            job = partial(self._replay, topic, events, subscription, _PARTS)
            found, then = await self._database.run(job)
            done += found
            events = replace(events, from_sequence=then)
            goes_on = 0 < then <= last
        return done

    def _replay(self, topic: str, events: Events, name: str, parts: int | None = None) -> tuple[int, int]:
        """Deliver events again, or so many parts of them; gives how many, and where it goes on or 0."""
        subscription = self._catalogue.attached(name)
        now, done = time.time(), 0
        for _ in itertools.count() if parts is None else range(parts):
            rows = self._events.rows(topic, events, _REPLAY)
            for row in rows:
                if subscription.wants(event(row).message.attributes):
                    self._messages.again(row[1:10], subscription, now)
                    done += 1
            if len(rows) < _REPLAY:
                return done, 0
            events = replace(events, from_sequence=rows[-1][0] + 1)
        return done, events.from_sequence

    async def seek(self, subscription: str, position: Position) -> None:
        """See Broker."""
        self._used(subscription)

        def job() -> None:
            found = self._catalogue.attached(subscription)
            self._database.touched.add(subscription)
            if position.snapshot:
                self._restore(position.snapshot, found)
                return
            if position.time is not None and not self._events.kept_for(found):
                if found.retain_acked:
                    self._retained.seek(found, position.time)
                else:
                    self._messages.drop_all(subscription, published_before=position.time)
                return
            topic = self._catalogue.topic(found.topic).name
            wanted = Events(after=position.time or 0.0, from_sequence=position.sequence or 0)
            self._events.rows(topic, wanted, 0)  # refuses a topic without a log before anything is dropped
            self._messages.drop_all(subscription)
            self._replay(topic, wanted, subscription)

        await self._database.run(job)

    def _restore(self, snapshot: str, subscription: Subscription) -> None:
        found = self._snapshots.get(snapshot)
        found.check_seek(subscription)
        self._messages.drop_all(subscription.name)
        self._snapshots.restore(found, subscription)

    # Snapshots.

    async def create_snapshot(self, name: str, subscription: str, labels: dict[str, str]) -> Snapshot:
        """See Broker."""
        self._used(subscription)
        return await self._database.run(lambda: self._snapshots.create(name, subscription, labels))

    async def get_snapshot(self, name: str) -> Snapshot:
        """See Broker."""
        return await self._database.run(lambda: self._snapshots.get(name))

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """See Broker."""
        return await self._database.run(lambda: self._snapshots.update(snapshot))

    async def list_snapshots(self, *, topic: str = "", limit: int, after: str = "") -> list[Snapshot]:
        """See Broker."""
        return await self._database.run(lambda: self._snapshots.page(topic, limit, after))

    async def delete_snapshot(self, name: str) -> None:
        """See Broker."""
        await self._database.run(lambda: self._snapshots.delete(name))


def _levels(db: sqlite3.Connection, names: Sequence[str], limit: int) -> Levels:
    now = time.time()
    return Levels({name: count(db, name, now) for name in names[:limit]}, complete=len(names) <= limit)
