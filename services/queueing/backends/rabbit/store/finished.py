"""Deliveries of deduplicated messages that are over: a double that RabbitMQ still has is not handed out.

A publish whose confirmation was lost is repeated and RabbitMQ may then have the message twice; an
acknowledgement may be lost with its connection.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, null, select, union_all

from services.queueing.backends.rabbit.store.tables import DEAD_LETTERS, DEFERRED, FINISHED, PARKED
from services.queueing.backends.rabbit.wire import from_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import BindParameter, CompoundSelect
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

    def __init__(self, database: Database) -> None:
        self._database = database

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

    async def settled(self, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        """For each message that came, whether it is over: finished, dead, in a line, deferred anew."""
        found: list[bool] = []
        async with self._database.reading() as connection:
            for start in range(0, len(arrived), _ROWS):
                found += await self._some(connection, subscription, arrived[start : start + _ROWS])
        return found

    @staticmethod
    async def _some(connection: AsyncConnection, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        keys = [finished_key(subscription, carried) for carried in arrived]
        ids = list({carried.stored.message_id for carried in arrived})
        given = {"keys": keys, "ids": ids, "subscription": subscription}
        over: set[str] = set()
        attempts: dict[tuple[str, str], float] = {}
        for key, message_id, copy, head in await connection.execute(_SETTLED, given):
            if key is not None:
                over.add(key)
                continue
            counted = from_head(head, message_id, b"").attempts if head is not None else math.inf
            attempts[message_id, copy] = max(counted, attempts.get((message_id, copy), 0))
        return [
            # A row with as many attempts is where this delivery came from, not what became of it.
            key in over or attempts.get((carried.stored.message_id, carried.copy), 0) > carried.attempts
            for carried, key in zip(arrived, keys, strict=True)
        ]


def _settled() -> CompoundSelect[Any]:
    """All that is known of deliveries: keys of those that are over; ids and copies of dead and deferred ones.

    One statement, made once: each costs more than what is looked up.
    """
    keys: BindParameter[str] = bindparam("keys", expanding=True)
    ids: BindParameter[str] = bindparam("ids", expanding=True)
    over = (
        select(table.c.key, null(), null(), null()).where(table.c.key.in_(keys))
        for table in (FINISHED, PARKED)
    )
    elsewhere = (
        select(null(), table.c.message_id, table.c["copy"], head).where(
            table.c.subscription == bindparam("subscription"), table.c.message_id.in_(ids)
        )
        for table, head in ((DEAD_LETTERS, null()), (DEFERRED, DEFERRED.c.head))
    )
    return union_all(*over, *elsewhere)


_SETTLED = _settled()
