"""What RabbitMQ cannot hold: the catalogue, dead letters, deduplication, messages whose time is to come."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from services.queueing.backends.rabbit.deferred import NEWS, Deferred
from services.queueing.backends.sqlite.catalogue import Catalogue
from services.queueing.backends.sqlite.database import Database
from services.queueing.backends.sqlite.dead_letters import DeadLetters

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Message
    from services.queueing.resources import Subscription, Topic


class State:
    """One file; open it with `async with`. Every method is durable when it returns."""

    def __init__(self, file: Path, *, dedup_window_s: float, max_waiting: int) -> None:
        self.database = Database(file, max_waiting=max_waiting)
        self.catalogue = Catalogue(self.database)
        self.deferred = Deferred(self.database, self.catalogue)
        self.dead = DeadLetters(self.database, self.catalogue, self.deferred)
        self._dedup_window_s = dedup_window_s
        self._routes: dict[str, tuple[Topic, list[Subscription]]] = {}

    async def __aenter__(self) -> Self:
        """Start the writer."""
        await self.database.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what was taken and close."""
        await self.database.__aexit__(kind, error, trace)

    def news(self) -> asyncio.Event:
        """Set when something was deferred."""
        return self.database.news(NEWS)

    def forget_routes(self) -> None:
        """Read the catalogue again: it changed."""
        self._routes.clear()

    async def route(self, topic: str) -> tuple[Topic, list[Subscription]]:
        """A topic and its subscriptions."""
        known = self._routes.get(topic)
        if known is None:
            known = await self.database.run(
                lambda: (self.catalogue.topic(topic), list(self.catalogue.subscribers(topic)))
            )
            self._routes[topic] = known
        return known

    async def same(self, topic: str, messages: Sequence[Message], ids: list[str]) -> list[bool]:
        """Give messages the ids of those with the same deduplication id; for each, whether it was published.

        An id whose message was not confirmed in time is given again, for the same message to be published.
        """
        wanted = [(number, m.dedup_id) for number, m in enumerate(messages) if m.dedup_id]
        published = [False] * len(messages)
        if not wanted:
            return published

        def job() -> None:
            db, now = self.database.connection, time.time()
            db.execute("DELETE FROM dedup WHERE seen < ?", (now - self._dedup_window_s,))
            for number, dedup_id in wanted:
                row = db.execute(
                    "SELECT message_id FROM dedup WHERE topic = ? AND dedup_id = ?", (topic, dedup_id)
                ).fetchone()
                if row is None:
                    # Until it is confirmed the id has a mark before it.
                    values = (topic, dedup_id, f"?{ids[number]}", now)
                    db.execute("INSERT INTO dedup VALUES (?, ?, ?, ?)", values)
                else:
                    ids[number] = row[0].removeprefix("?")
                    published[number] = not row[0].startswith("?")

        await self.database.run(job)
        # Twice in one batch: only the first is published.
        first: set[str] = set()
        for number, _ in wanted:
            published[number] = published[number] or ids[number] in first
            first.add(ids[number])
        return published

    async def confirmed(self, topic: str, messages: Sequence[Message], ids: Sequence[str]) -> None:
        """Remember that messages with deduplication ids are with the broker."""
        wanted = [(ids[n], topic, m.dedup_id) for n, m in enumerate(messages) if m.dedup_id]
        if wanted:
            query = "UPDATE dedup SET message_id = ? WHERE topic = ? AND dedup_id = ?"
            await self.database.run(lambda: self.database.connection.executemany(query, wanted))

    # Settling, for windows.

    async def defer(self, subscription: Subscription, carried: Carried, due: float) -> None:
        """See Settling."""
        await self.database.run(lambda: self.deferred.put(subscription.name, carried, due))

    async def bury(self, subscription: Subscription, carried: Carried, reason: str) -> None:
        """See Settling."""

        def job() -> None:
            current = self.catalogue.subscription(subscription.name)
            history = json.dumps(carried.history)
            self.dead.bury(current, carried.row(), reason, time.time(), carried.attempts, history)

        await self.database.run(job)

    async def settled(self, subscription: Subscription, message_id: str) -> bool:
        """See Settling."""
        return await self.database.run(lambda: self.deferred.settled(subscription.name, message_id))


def copies(carried: Carried, takers: Sequence[Subscription]) -> list[tuple[str, Carried]]:
    """A message for each of its subscriptions, by name, each a delivery of its own."""
    return [(taker.name, replace(carried, copy=uuid.uuid4().hex)) for taker in takers]
