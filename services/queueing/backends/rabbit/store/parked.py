"""Messages of ordered subscriptions in the lines of their keys, see `aside`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, exists, func, or_, select, text

from services.queueing.backends.rabbit.state import Parked
from services.queueing.backends.rabbit.store.deferred import columns
from services.queueing.backends.rabbit.store.finished import finished_key
from services.queueing.backends.rabbit.store.tables import DEAD_LETTERS, FINISHED, PARKED
from services.queueing.backends.rabbit.wire import from_head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.state import Guard
    from services.queueing.backends.rabbit.store.finished import Finished
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Subscription
    from services.queueing.state import Database

_ROWS = 500
"""Of one statement: SQLite binds at most 32 766 values."""


class Lines:
    """Keeps and gives back."""

    def __init__(self, database: Database, finished: Finished) -> None:
        self._database = database
        self._finished = finished

    async def put(self, subscription: str, entries: Sequence[Parked], guard: Guard | None) -> None:
        """Keep messages; those that are there already stay."""
        rows = [_row(subscription, entry) for entry in entries]
        async with self._database.transaction() as connection:
            if guard is not None:
                # It locks: whoever stops here lets others wait no longer than this.
                await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 5000"))
                await guard(connection)
            await connection.execute(self._database.insert(PARKED).on_conflict_do_nothing(), rows)

    async def remove(self, keys: Sequence[str]) -> list[None]:
        """Forget messages, given as `finished_key`, and remember that they are over."""
        async with self._database.transaction() as connection:
            await self._finished.put(connection, keys)
            for start in range(0, len(keys), _ROWS):
                some = keys[start : start + _ROWS]
                await connection.execute(delete(PARKED).where(PARKED.c.key.in_(some)))
        return [None] * len(keys)

    async def counts(self, subscription: str) -> tuple[dict[str, int], int]:
        """How many messages there are of each key, and the last position; those that are over go."""
        of_it = PARKED.c.subscription == subscription
        query = select(PARKED.c.line, func.count(), func.max(PARKED.c.position)).where(of_it)
        query = query.group_by(PARKED.c.line)
        async with self._database.reading() as connection:
            if not (await connection.execute(query.limit(1))).all():
                return {}, 0
        finished = exists().where(FINISHED.c.key == PARKED.c.key)
        dead = exists().where(
            DEAD_LETTERS.c.subscription == subscription,
            DEAD_LETTERS.c.message_id == PARKED.c.message_id,
            DEAD_LETTERS.c["copy"] == PARKED.c["copy"],
        )
        async with self._database.transaction() as connection:
            await connection.execute(delete(PARKED).where(of_it, or_(finished, dead)))
            rows = (await connection.execute(query)).all()
        return {json.loads(row[0]): row[1] for row in rows}, max((row[2] for row in rows), default=0)

    async def count(self, subscription: str) -> int:
        """How many messages there are."""
        query = select(func.count()).where(PARKED.c.subscription == subscription)
        async with self._database.reading() as connection:
            return (await connection.execute(query)).scalar_one()

    async def read(
        self, subscription: str, lines: Mapping[str, int], *, limit: int
    ) -> dict[str, list[Parked]]:
        """Messages of keys, in order, of each key so many after a position."""
        query = (
            select(PARKED)
            .where(
                PARKED.c.subscription == subscription,
                PARKED.c.line == bindparam("of"),
                PARKED.c.position > bindparam("after"),
            )
            .order_by(PARKED.c.position)
            .limit(limit)
        )
        found = {}
        async with self._database.reading() as connection:
            # A statement each, by the index: one for all would look at the whole lines.
            for key, after in lines.items():
                rows = await connection.execute(query, {"of": json.dumps(key), "after": after})
                found[key] = [Parked(row.position, _carried(row), row.arrived) for row in rows]
        return found

    async def recall(self, keys: Sequence[str]) -> list[Carried | None]:
        """Messages, given as `finished_key`; none for what is there no more."""
        found = {}
        async with self._database.reading() as connection:
            for start in range(0, len(keys), _ROWS):
                query = select(PARKED).where(PARKED.c.key.in_(keys[start : start + _ROWS]))
                for row in await connection.execute(query):
                    found[row.key] = _carried(row)
        return [found.get(key) for key in keys]

    async def pass_over(self, subscription: Subscription) -> dict[str, list[int]]:
        """Forget what Seek has passed over; the positions of the others, by key."""
        after, table = "", PARKED.c
        left: dict[str, list[int]] = {}
        columns = (table.key, table.line, table.position, table.message_id, table.head)
        query = select(*columns).where(table.subscription == subscription.name).order_by(table.key)
        while True:
            async with self._database.transaction() as connection:
                rows = (await connection.execute(query.where(table.key > after).limit(_ROWS))).all()
                past = []
                for row in rows:
                    if from_head(row.head, row.message_id, b"").wanted(subscription):
                        left.setdefault(json.loads(row.line), []).append(row.position)
                    else:
                        past.append(row.key)
                if past:
                    await connection.execute(delete(PARKED).where(table.key.in_(past)))
            if len(rows) < _ROWS:
                return left
            after = rows[-1].key

    async def messages(self, subscription: str, limit: int) -> list[Carried]:
        """Messages of all keys, in the order in which they came."""
        query = select(PARKED).where(PARKED.c.subscription == subscription)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(PARKED.c.position).limit(limit))
            return [_carried(row) for row in rows]

    @staticmethod
    async def drop(connection: AsyncConnection, subscription: str) -> None:
        """Forget what is kept for a subscription."""
        await connection.execute(delete(PARKED).where(PARKED.c.subscription == subscription))


def _carried(row: Row[Any]) -> Carried:
    return from_head(row.head, row.message_id, row.data)


def _row(subscription: str, entry: Parked) -> dict[str, Any]:
    return {
        "key": finished_key(subscription, entry.as_arrived()),
        "line": json.dumps(entry.carried.stored.ordering_key),
        "position": entry.position,
        "arrived": entry.arrived,
        **columns(subscription, entry.carried),
    }
