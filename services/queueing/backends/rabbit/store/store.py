"""The State of the RabbitMQ backend, in a database."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Self

import structlog
from sqlalchemy import delete

from services.queueing.backends.rabbit.link import end
from services.queueing.backends.rabbit.store import snapshots
from services.queueing.backends.rabbit.store.catalogue import Catalogue, attached
from services.queueing.backends.rabbit.store.dead_letters import DeadLetters
from services.queueing.backends.rabbit.store.dedup import Dedup, key_of
from services.queueing.backends.rabbit.store.deferred import Deferred
from services.queueing.backends.rabbit.store.finished import Finished, finished_key
from services.queueing.backends.rabbit.store.gathered import Gathered
from services.queueing.backends.rabbit.store.parked import Lines
from services.queueing.backends.rabbit.store.tables import DEDUP, FINISHED, SCHEMA
from services.queueing.kept import Where
from services.queueing.state import leases
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.state import (
        Deferral,
        Due,
        Guard,
        Kept,
        Parked,
        Reservation,
        Route,
    )
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Message
    from services.queueing.kept import DeadLetter, DeadLetterStats, Redrive
    from services.queueing.resources import Snapshot, Subscription, Topic
    from services.queueing.state import Database

log = structlog.get_logger(__name__)


class SqlState:
    """A State in SQLite or PostgreSQL; open it with `async with`."""

    def __init__(
        self,
        database: Database,
        *,
        dedup_window_s: float,
        hold_s: float,
        max_waiting: int,
        holder: Callable[[], str] = str,
    ) -> None:
        """Set it up; the database stays its owner's.

        Args:
            database: Open, and so until the end.
            dedup_window_s: How long deduplication ids are remembered.
            hold_s: How long a publish may take until it is confirmed or given up.
            max_waiting: Writes of each kind that may wait.
            holder: The lease that says that this replica lives; empty while it has none.
        """
        self._database = database
        self._catalogue = Catalogue(database)
        self._deferred = Deferred(database, hold_s=hold_s)
        self._dead = DeadLetters(database, self._deferred)
        self._dedup = Dedup(database, window_s=dedup_window_s, hold_s=hold_s, holder=holder)
        self._reserving = Gathered(self._dedup.reserve, waiting=max_waiting)
        self._confirming = Gathered(self._dedup.confirm, waiting=max_waiting)
        self._finished = Finished(database)
        self._window_s = dedup_window_s
        self._deferring = Gathered(self._deferred.write, waiting=max_waiting)
        self._finishing = Gathered(self._finished.write, waiting=max_waiting)
        self._lines = Lines(database, self._finished)
        self._unparking = Gathered(self._lines.remove, waiting=max_waiting)
        self._stack = AsyncExitStack()
        self._news = asyncio.Event()
        self._dropping: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Bring the tables up to date."""
        await self._database.migrate(leases.SCHEMA)
        await self._database.migrate(SCHEMA)
        if not self._database.shared:
            await self._dedup.recover()
        for gathered in (self._reserving, self._confirming, self._deferring):
            await self._stack.enter_async_context(gathered)
        for finishing in (self._finishing, self._unparking):
            await self._stack.enter_async_context(finishing)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what was taken."""
        await end(list(self._dropping))
        await self._stack.__aexit__(kind, error, trace)

    @property
    def shared(self) -> bool:
        """See State."""
        return self._database.shared

    # The catalogue.

    async def fresh(self) -> None:
        """See State."""
        await self._catalogue.fresh()

    async def route(self, topic: str) -> Route:
        """See State."""
        return await self._catalogue.route(topic)

    async def topic(self, name: str) -> Topic:
        """See State."""
        async with self._database.reading() as connection:
            return await self._catalogue.read_topic(connection, name)

    async def topics(self, limit: int, after: str) -> list[Topic]:
        """See State."""
        return await self._catalogue.topics(limit, after)

    async def create_topic(self, topic: Topic) -> Topic:
        """See State."""
        return await self._catalogue.create_topic(topic)

    async def update_topic(self, topic: Topic) -> Topic:
        """See State."""
        return await self._catalogue.update_topic(topic)

    async def delete_topic(self, name: str) -> None:
        """See State."""
        await self._catalogue.delete_topic(name)

    async def subscription(self, name: str) -> Subscription:
        """See State."""
        return await self._catalogue.subscription(name)

    async def attached(self, name: str) -> Subscription:
        """See State."""
        return attached(await self._catalogue.subscription(name))

    async def subscriptions(self, topic: str, limit: int, after: str) -> list[Subscription]:
        """See State."""
        return await self._catalogue.subscriptions(topic, limit, after)

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """See State."""
        await self._deferred.drop_left(subscription.name)
        return await self._catalogue.create_subscription(subscription)

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """See State."""
        return await self._catalogue.update_subscription(subscription)

    async def pass_over(self, name: str, published_before: float) -> Subscription:
        """See State."""

        async def also(connection: AsyncConnection, subscription: Subscription) -> None:
            await self._deferred.drop_past(connection, subscription)

        return await self._catalogue.pass_over(name, published_before, also)

    async def delete_subscription(self, name: str) -> None:
        """See State."""
        last = 0

        async def also(connection: AsyncConnection) -> None:
            nonlocal last
            last = await self._deferred.last(connection)
            await self._lines.drop(connection, name)
            await self._dead.delete(connection, name, Where())

        await self._catalogue.delete_subscription(name, also)
        # A million of them take longer than a caller waits. What a death leaves is dropped when it is due.
        task = asyncio.create_task(self._drop(name, last))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, name: str, last: int) -> None:
        try:
            await self._deferred.drop(name, last)
        except PlexusError as error:
            log.warning("deferred_not_dropped", subscription=name, reason=error.reason)

    # Deduplication.

    async def reserve(self, topic: Topic, wanted: Sequence[tuple[Message, str]]) -> Sequence[Reservation]:
        """See State."""
        return await self._reserving.submit([(key_of(topic, m.dedup_id), known) for m, known in wanted])

    async def confirmed(self, topic: Topic, messages: Sequence[Message]) -> None:
        """See State."""
        await self._confirming.submit([key_of(topic, message.dedup_id) for message in messages])

    async def released(self, topic: Topic, messages: Sequence[Message]) -> None:
        """See State."""
        await self._dedup.release([key_of(topic, message.dedup_id) for message in messages])

    async def tidy(self) -> None:
        """See State."""
        for table in (DEDUP, FINISHED):
            async with self._database.transaction() as connection:
                before = await self._database.now(connection) - self._window_s
                await connection.execute(delete(table).where(table.c.seen < before))

    async def finish(self, subscription: str, arrived: Sequence[Carried]) -> None:
        """See State."""
        await self._finishing.submit([finished_key(subscription, carried) for carried in arrived])

    # Deferred messages.

    def news(self) -> asyncio.Event:
        """See State."""
        if self._news.is_set():
            self._news = asyncio.Event()
        return self._news

    async def defer(self, entries: Sequence[Deferral]) -> None:
        """See State."""
        await self._deferring.submit(entries)
        self._news.set()

    @asynccontextmanager
    async def due(self, limit: int) -> AsyncIterator[list[Due]]:
        """See State."""
        async with self._deferred.due(limit) as entries:
            yield entries

    async def earliest(self) -> float | None:
        """See State."""
        return await self._deferred.earliest()

    async def deferred(self, subscription: str) -> int:
        """See State."""
        return await self._deferred.count(subscription)

    async def tallies(self) -> tuple[dict[str, int], dict[str, int]]:
        """See State."""
        return await self._deferred.tally(), await self._dead.tally()

    async def drop_deferred(self, subscription: str) -> None:
        """See State."""
        await self._deferred.drop_now(subscription)
        async with self._database.transaction() as connection:
            await self._lines.drop(connection, subscription)

    # Messages in the lines of their keys.

    async def park(self, subscription: str, entries: Sequence[Parked], guard: Guard | None) -> None:
        """See State."""
        await self._lines.put(subscription, entries, guard)

    async def unpark(self, subscription: str, arrived: Sequence[Carried]) -> None:
        """See State."""
        await self._unparking.submit([finished_key(subscription, carried) for carried in arrived])

    async def lines(self, subscription: str) -> tuple[dict[str, int], int]:
        """See State."""
        return await self._lines.counts(subscription)

    async def parked(
        self, subscription: str, lines: Mapping[str, int], *, limit: int
    ) -> dict[str, list[Parked]]:
        """See State."""
        return await self._lines.read(subscription, lines, limit=limit)

    async def recall(self, subscription: str, arrived: Sequence[Carried]) -> list[Carried | None]:
        """See State."""
        return await self._lines.recall([finished_key(subscription, carried) for carried in arrived])

    async def set_aside(self, subscription: str) -> int:
        """See State."""
        return await self._lines.count(subscription)

    async def pass_over_parked(self, subscription: Subscription) -> dict[str, list[int]]:
        """See State."""
        return await self._lines.pass_over(subscription)

    async def parked_messages(self, subscription: str, limit: int) -> list[Carried]:
        """See State."""
        return await self._lines.messages(subscription, limit)

    async def settled(self, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        """See State."""
        return await self._finished.settled(subscription, arrived)

    # Dead letters.

    async def bury(self, subscription: str, carried: Carried, reason: str) -> None:
        """See State."""
        if await self._dead.bury(subscription, carried, reason):
            self._news.set()

    async def dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int
    ) -> list[DeadLetter]:
        """See State."""
        return await self._dead.read(subscription, where, limit=limit, after=after)

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """See State."""
        return await self._dead.stats(subscription)

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """See State."""
        moved = await self._dead.redrive(subscription, where, how)
        self._news.set()
        return moved

    async def purge(self, subscription: str, where: Where) -> int:
        """See State."""
        return await self._dead.purge(subscription, where)

    # Snapshots.

    async def begin_snapshot(self, kept: Kept) -> None:
        """See State."""
        await self._catalogue.change(lambda connection: snapshots.begin(connection, kept))

    async def finish_snapshot(self, snapshot: Snapshot) -> None:
        """See State."""
        await self._catalogue.change(lambda connection: snapshots.finish(connection, snapshot))

    async def snapshot(self, name: str) -> Kept:
        """See State."""
        async with self._database.reading() as connection:
            return await snapshots.get(connection, name)

    async def snapshots(self, topic: str, limit: int, after: str) -> list[Snapshot]:
        """See State."""
        async with self._database.reading() as connection:
            return await snapshots.page(connection, topic, limit, after)

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """See State."""
        return await self._catalogue.change(lambda connection: snapshots.change(connection, snapshot))

    async def drop_snapshot(self, kept: Kept) -> None:
        """See State."""
        await self._catalogue.change(lambda connection: snapshots.drop(connection, kept))

    async def old_snapshots(self) -> list[Kept]:
        """See State."""
        async with self._database.reading() as connection:
            return await snapshots.old(connection)

    async def deferred_messages(self, subscription: str, limit: int) -> list[Carried]:
        """See State."""
        return await self._deferred.messages(subscription, limit)
