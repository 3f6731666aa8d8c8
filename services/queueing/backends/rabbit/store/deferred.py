"""Messages that RabbitMQ cannot hold until their time comes."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select, text

from services.queueing.backends.rabbit.state import STREAM, Deferral, Due
from services.queueing.backends.rabbit.store.catalogue import Catalogue, subscribers
from services.queueing.backends.rabbit.store.snapshots import keepers
from services.queueing.backends.rabbit.store.tables import DEFERRED, SUBSCRIPTIONS
from services.queueing.backends.rabbit.topology import log_name, retained_name
from services.queueing.backends.rabbit.wire import Carried, again, from_head, head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.resources import Subscription
    from services.queueing.state import Database

_MAX_BYTES = 16 * 1024 * 1024
"""Of messages that are moved at once."""
_SOME = 1000
_DROPPED = 5000
"""Of one transaction, which others wait for."""
_ORDER = (DEFERRED.c.due, DEFERRED.c.subscription, DEFERRED.c.id)
"""Of one subscription, in order of time, then as they were kept."""


class Deferred:
    """Keeps and gives back."""

    def __init__(self, database: Database, *, hold_s: float) -> None:
        """Set it up.

        Args:
            database: Where they are.
            hold_s: How long messages that are due may be in somebody's hands.
        """
        self._database = database
        self._hold_s = hold_s
        self._handed_out: set[int] = set()

    async def write(self, entries: Sequence[Deferral]) -> list[None]:
        """Keep messages."""
        async with self._database.transaction() as connection:
            await self.put(connection, entries)
        return [None] * len(entries)

    @staticmethod
    async def put(connection: AsyncConnection, entries: Sequence[Deferral]) -> None:
        """Keep messages, as a part of a transaction."""
        if entries:
            await connection.execute(insert(DEFERRED), [_row(entry) for entry in entries])

    async def forward(
        self, connection: AsyncConnection, carried: Carried, topic: str, extra: dict[str, str], due: float
    ) -> bool:
        """Keep a message for those who follow another topic; false if no subscription there would get it."""
        attributes = {**carried.stored.attributes, **extra}
        moved = replace(carried, stored=replace(carried.stored, topic=topic, attributes=attributes))
        takers = [taker for taker in await subscribers(connection, topic) if taker.wants(attributes)]
        if not takers:
            return False
        streams = [retained_name(taker.name) for taker in takers if taker.retain_acked]
        if (await Catalogue.read_topic(connection, topic)).log:
            streams.append(log_name(topic))
        every = await keepers(connection, topic)
        streams += [kept.stream for kept in every if kept.snapshot.keeps(topic, attributes)]
        wanted = [Deferral(taker.name, again(moved), due) for taker in takers]
        wanted += [Deferral(STREAM + stream, again(moved), 0.0) for stream in streams]
        await self.put(connection, wanted)
        return True

    @asynccontextmanager
    async def due(self, limit: int) -> AsyncIterator[list[Due]]:
        """What is due, up to a bound of bytes but at least one, forgotten at the end of the block."""
        query = (
            select(DEFERRED.c.id, func.length(DEFERRED.c.data))
            .where(DEFERRED.c.due <= time.time())
            .order_by(*_ORDER)
        )
        if not self._database.shared:
            # A transaction would keep all others waiting, and there is nobody to share with.
            async with self._database.reading() as connection:
                found = (await connection.execute(query.limit(limit + len(self._handed_out)))).all()
                free = [row for row in found if row[0] not in self._handed_out]
                numbers = _bounded(free)
                rows = await _read(connection, numbers)
            self._handed_out.update(numbers)
            try:
                yield rows
                if numbers:
                    async with self._database.transaction() as connection:
                        await _forget(connection, numbers)
            finally:
                self._handed_out.difference_update(numbers)
            return
        async with self._database.transaction() as connection:
            # The locks are gone with the process, at once if it dies, and after this time if it hangs.
            limit_ms = round(self._hold_s * 1000)
            await connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {limit_ms}"))
            locked = query.limit(limit).with_for_update(skip_locked=True)
            numbers = _bounded((await connection.execute(locked)).all())
            yield await _read(connection, numbers)
            await _forget(connection, numbers)

    async def earliest(self) -> float | None:
        """When the next message is due."""
        async with self._database.reading() as connection:
            found: float | None = (await connection.execute(select(func.min(DEFERRED.c.due)))).scalar()
            return found

    async def count(self, subscription: str) -> int:
        """How many messages wait for their time."""
        query = select(func.count()).select_from(DEFERRED)
        # By an expression: else each row is looked up through the other index, whose order is not theirs.
        of_it = (func.coalesce(DEFERRED.c.subscription, "") == subscription) & (DEFERRED.c.due > time.time())
        async with self._database.reading() as connection:
            return int((await connection.execute(query.where(of_it))).scalar_one())

    async def tally(self) -> dict[str, int]:
        """How many messages of each subscription wait for their time."""
        name = DEFERRED.c.subscription
        query = select(name, func.count()).where(DEFERRED.c.due > time.time()).group_by(name)
        async with self._database.reading() as connection:
            return {row[0]: int(row[1]) for row in await connection.execute(query)}

    async def messages(self, subscription: str, limit: int) -> list[Carried]:
        """What waits, by the time that it waits for."""
        query = select(DEFERRED).where(DEFERRED.c.subscription == subscription)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(*_ORDER).limit(limit))
            return [_deferral(row).carried for row in rows]

    @staticmethod
    async def drop_past(connection: AsyncConnection, subscription: Subscription) -> None:
        """Forget what Seek has passed over."""
        after, table = 0, DEFERRED.c
        query = select(table.id, table.message_id, table.head).where(table.subscription == subscription.name)
        while True:
            rows = (
                await connection.execute(query.where(table.id > after).order_by(table.id).limit(_SOME))
            ).all()
            past = [
                row.id for row in rows if not from_head(row.head, row.message_id, b"").wanted(subscription)
            ]
            if past:
                await _forget(connection, past)
            if len(rows) < _SOME:
                return
            after = rows[-1].id

    @staticmethod
    async def last(connection: AsyncConnection) -> int:
        """The highest number so far: what is kept from now on has higher ones."""
        return int((await connection.execute(select(func.max(DEFERRED.c.id)))).scalar() or 0)

    async def drop_now(self, subscription: str) -> None:
        """Forget what is kept for a subscription now."""
        async with self._database.reading() as connection:
            last = await self.last(connection)
        await self.drop(subscription, last)

    async def drop_left(self, subscription: str) -> None:
        """Forget what is kept for one of that name that was deleted, if there is none now."""
        async with self._database.reading() as connection:
            last = await self.last(connection)  # first: one that is made after this has later ones
            named = select(SUBSCRIPTIONS.c.name).where(SUBSCRIPTIONS.c.name == subscription)
            present = (await connection.execute(named)).scalar()
        if last and present is None:
            await self.drop(subscription, last)

    async def drop(self, subscription: str, last: int) -> None:
        """Forget what is kept for a subscription up to a number, in steps that others wait for shortly."""
        some = select(DEFERRED.c.id).where(DEFERRED.c.subscription == subscription, DEFERRED.c.id <= last)
        while True:
            async with self._database.transaction() as connection:
                numbers = list((await connection.execute(some.limit(_DROPPED))).scalars())
                if numbers:
                    await _forget(connection, numbers)
            if len(numbers) < _DROPPED:
                return


def _bounded(found: Sequence[Any]) -> list[int]:
    """Those of the messages found, given by id and size, that fit into the memory set aside for them."""
    numbers: list[int] = []
    total = 0
    for number, size in found:
        total += size
        if numbers and total > _MAX_BYTES:
            break
        numbers.append(number)
    return numbers


async def _read(connection: AsyncConnection, numbers: Sequence[int]) -> list[Due]:
    if not numbers:
        return []
    columns = (DEFERRED.c.subscription, DEFERRED.c.message_id, DEFERRED.c.head, DEFERRED.c.data)
    query = select(*columns).where(DEFERRED.c.id.in_(numbers)).order_by(*_ORDER)
    return [Due(*row) for row in await connection.execute(query)]


async def _forget(connection: AsyncConnection, numbers: Sequence[int]) -> None:
    await connection.execute(delete(DEFERRED).where(DEFERRED.c.id.in_(numbers)))


def columns(subscription: str, carried: Carried) -> dict[str, Any]:
    """What rows of deferred messages and dead letters have in common."""
    return {
        "subscription": subscription,
        "message_id": carried.stored.message_id,
        "copy": carried.copy,
        "head": head(carried),
        "data": carried.stored.data,
    }


def _row(entry: Deferral) -> dict[str, Any]:
    return {"due": entry.due, **columns(entry.subscription, entry.carried)}


def _deferral(row: Any) -> Deferral:
    return Deferral(row.subscription, from_head(row.head, row.message_id, row.data), row.due)


def copies(carried: Carried, names: Sequence[str], due: float) -> list[Deferral]:
    """A message for each of its subscriptions; when it is kept twice, both are the same delivery."""
    return [Deferral(name, replace(carried, copy="delayed"), due) for name in names]
