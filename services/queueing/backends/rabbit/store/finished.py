"""Deliveries of deduplicated messages that are over: a double that RabbitMQ still has is not handed out.

A publish whose confirmation was lost is repeated and RabbitMQ may then have the message twice; an
acknowledgement may be lost with its connection.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sqlalchemy import delete, select

from services.queueing.backends.rabbit.store.tables import DEAD_LETTERS, DEFERRED, FINISHED, PARKED
from services.queueing.backends.rabbit.wire import from_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.state import Database

_ROWS = 500
"""Of one statement: SQLite binds at most 32 766 values."""


def finished_key(subscription: str, carried: Carried) -> str:
    """Under which a delivery is remembered: message, copy and failed attempts tell it from others."""
    text = f"{subscription}\0{carried.stored.message_id}\0{carried.copy}\0{carried.attempts}"
    return hashlib.sha256(text.encode()).hexdigest()


class Finished:
    """Remembers for as long as deduplication ids are."""

    def __init__(self, database: Database, *, window_s: float) -> None:
        self._database = database
        self._window_s = window_s

    async def write(self, keys: Sequence[str]) -> list[None]:
        """Remember deliveries, given as `finished_key`."""
        async with self._database.transaction() as connection:
            await self.put(connection, keys)
        return [None] * len(keys)

    async def put(self, connection: AsyncConnection, keys: Sequence[str]) -> None:
        """Remember deliveries, as a part of a transaction."""
        now = await self._database.now(connection)
        rows = [{"key": key, "seen": now} for key in sorted(set(keys))]
        await connection.execute(self._database.insert(FINISHED).on_conflict_do_nothing(), rows)

    async def forget_old(self) -> None:
        """Delete what is older than the window."""
        async with self._database.transaction() as connection:
            now = await self._database.now(connection)
            await connection.execute(delete(FINISHED).where(FINISHED.c.seen < now - self._window_s))

    async def settled(self, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        """For each message that came, whether it is over: finished, dead, in a line, deferred anew."""
        found: list[bool] = []
        async with self._database.reading() as connection:
            for start in range(0, len(arrived), _ROWS):
                found += await self._some(connection, subscription, arrived[start : start + _ROWS])
        return found

    @staticmethod
    async def _some(connection: AsyncConnection, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        ids = {carried.stored.message_id for carried in arrived}
        keys = {finished_key(subscription, carried) for carried in arrived}
        over: set[str] = set()
        for table in (FINISHED, PARKED):
            over.update(
                (await connection.execute(select(table.c.key).where(table.c.key.in_(keys)))).scalars()
            )
        dead = select(DEAD_LETTERS.c.message_id, DEAD_LETTERS.c["copy"]).where(
            DEAD_LETTERS.c.subscription == subscription, DEAD_LETTERS.c.message_id.in_(ids)
        )
        buried = {(row[0], row[1]) for row in await connection.execute(dead)}
        later = select(DEFERRED.c.message_id, DEFERRED.c["copy"], DEFERRED.c.head).where(
            DEFERRED.c.subscription == subscription, DEFERRED.c.message_id.in_(ids)
        )
        attempts: dict[tuple[str, str], int] = {}
        for message_id, copy, head in await connection.execute(later):
            counted = from_head(head, message_id, b"").attempts
            attempts[message_id, copy] = max(counted, attempts.get((message_id, copy), 0))
        results = []
        for carried in arrived:
            one = (carried.stored.message_id, carried.copy)
            # A row with as many attempts is where this delivery came from, not what became of it.
            results.append(
                finished_key(subscription, carried) in over
                or one in buried
                or attempts.get(one, 0) > carried.attempts
            )
        return results
