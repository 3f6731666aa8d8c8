"""Messages that were given up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select

from services.queueing.backends.rabbit.state import Deferral
from services.queueing.backends.rabbit.store.catalogue import Catalogue, attached, subscribers
from services.queueing.backends.rabbit.store.deferred import columns
from services.queueing.backends.rabbit.store.tables import DEAD_LETTERS
from services.queueing.backends.rabbit.wire import Carried, again, from_head
from services.queueing.kept import DeadLetter, DeadLetterStats, Redrive, Where
from services.runtime.errors import FailedPreconditionError, NotFoundError

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.store.deferred import Deferred
    from services.queueing.resources import Subscription
    from services.queueing.state import Database

_MOVE = 500


class DeadLetters:
    """Buries, reads, redrives and purges."""

    def __init__(self, database: Database, deferred: Deferred) -> None:
        self._database = database
        self._deferred = deferred

    async def bury(self, name: str, carried: Carried, reason: str) -> bool:
        """Give up a message; whether it went to a dead letter topic."""
        now = time.time()
        async with self._database.transaction() as connection:
            subscription = await Catalogue.read_subscription(connection, name)
            if await self._forwarded(connection, subscription, carried, reason, now):
                return True
            statement = self._database.insert(DEAD_LETTERS).values(
                topic=_clean(carried.stored.topic),
                died=now,
                reason=_clean(reason),
                **columns(name, carried),
            )
            await connection.execute(statement.on_conflict_do_nothing())
        return False

    async def _forwarded(
        self,
        connection: AsyncConnection,
        subscription: Subscription,
        carried: Carried,
        reason: str,
        now: float,
    ) -> bool:
        target = subscription.dead_letter_topic
        if not target:
            return False
        try:
            await Catalogue.read_topic(connection, target)
        except NotFoundError:
            return False  # it was deleted: the message stays here
        extra = {
            "plexus-dead-letter-subscription": subscription.name,
            "plexus-dead-letter-topic": carried.stored.topic,
            "plexus-dead-letter-reason": reason,
            "plexus-dead-letter-attempts": str(carried.attempts),
        }
        return await self._deferred.forward(connection, carried, target, extra, now)

    async def read(self, name: str, where: Where, *, limit: int, after: int) -> list[DeadLetter]:
        """Read dead letters, oldest first."""
        query = select(DEAD_LETTERS).where(self._matching(name, where), DEAD_LETTERS.c.id > after)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(DEAD_LETTERS.c.id).limit(limit))
            return [_dead_letter(row) for row in rows]

    async def stats(self, name: str) -> DeadLetterStats:
        """Count dead letters."""
        table = DEAD_LETTERS.c
        here = table.subscription == name
        count = func.count().label("count")
        by_reason = select(table.reason, count).where(here).group_by(table.reason)
        totals = select(func.count(), func.min(table.died), func.max(table.died)).where(here)
        async with self._database.reading() as connection:
            rows = await connection.execute(by_reason.order_by(count.desc()).limit(100))
            reasons = {row.reason: int(row[1]) for row in rows}
            total, oldest, newest = (await connection.execute(totals)).one()
        return DeadLetterStats(total, reasons, oldest or 0.0, newest or 0.0)

    async def tally(self) -> dict[str, int]:
        """How many each subscription has."""
        name = DEAD_LETTERS.c.subscription
        async with self._database.reading() as connection:
            rows = await connection.execute(select(name, func.count()).group_by(name))
            return {row[0]: int(row[1]) for row in rows}

    async def redrive(self, name: str, where: Where, how: Redrive) -> int:
        """Defer dead letters, in parts that are each one transaction."""
        start, done, after = time.time(), 0, 0
        last = await self._last(name)  # what dies again meanwhile is not moved again
        while True:
            async with self._database.transaction() as connection:
                subscription = attached(await Catalogue.read_subscription(connection, name))
                await self._check_target(connection, how.topic)
                query = (
                    select(DEAD_LETTERS)
                    .where(self._matching(name, where), DEAD_LETTERS.c.id.between(after + 1, last))
                    .order_by(DEAD_LETTERS.c.id)
                    .limit(_MOVE)
                )
                rows = (await connection.execute(query.with_for_update(skip_locked=True))).all()
                if not rows:
                    return done
                after = rows[-1].id
                moved: list[int] = []
                kept: list[Deferral] = []
                for row in rows:
                    due = start + ((done + len(moved)) / how.per_second if how.per_second else 0.0)
                    carried = from_head(row.head, row.message_id, row.data)
                    if not how.topic:
                        kept.append(Deferral(subscription.name, again(carried), due))
                    elif not await self._deferred.forward(connection, again(carried), how.topic, {}, due):
                        continue  # no subscription's filter lets it through: it stays
                    moved.append(row.id)
                await self._deferred.put(connection, kept)
                await connection.execute(delete(DEAD_LETTERS).where(DEAD_LETTERS.c.id.in_(moved)))
            done += len(moved)

    async def _last(self, name: str) -> int:
        query = select(func.max(DEAD_LETTERS.c.id)).where(DEAD_LETTERS.c.subscription == name)
        async with self._database.reading() as connection:
            return int((await connection.execute(query)).scalar() or 0)

    @staticmethod
    async def _check_target(connection: AsyncConnection, topic: str) -> None:
        if not topic:
            return
        await Catalogue.read_topic(connection, topic)
        if not await subscribers(connection, topic):
            raise FailedPreconditionError(
                f"nobody subscribes to {topic!r}: the messages would be lost",
                reason="TOPIC_HAS_NO_SUBSCRIBERS",
                metadata={"topic": topic},
            )

    async def purge(self, name: str, where: Where) -> int:
        """Delete dead letters."""
        async with self._database.transaction() as connection:
            await Catalogue.read_subscription(connection, name)
            return await self.delete(connection, name, where)

    async def delete(self, connection: AsyncConnection, name: str, where: Where) -> int:
        """Delete dead letters, as a part of a transaction."""
        return (await connection.execute(delete(DEAD_LETTERS).where(self._matching(name, where)))).rowcount

    def _matching(self, name: str, where: Where) -> ColumnElement[bool]:
        table = DEAD_LETTERS.c
        condition = table.subscription == name
        if where.ids:
            # A number that no column holds is nobody's id.
            numbers = [int(known) for known in where.ids if known.isdecimal() and len(known) < 19]  # noqa: PLR2004 - digits of 2^63
            condition &= table.id.in_(numbers)
        if where.reason:
            find = func.strpos if self._database.shared else func.instr
            condition &= find(table.reason, _clean(where.reason)) > 0
        if where.topic:
            condition &= table.topic == _clean(where.topic)
        if where.after:
            condition &= table.died >= where.after
        if where.before:
            condition &= table.died < where.before
        return condition


def _clean(text: str) -> str:
    """Without the one character that PostgreSQL's texts cannot hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _dead_letter(row: Row[Any]) -> DeadLetter:
    carried = from_head(row.head, row.message_id, row.data)
    return DeadLetter(
        id=str(row.id),
        message=carried.stored,
        died=row.died,
        reason=row.reason,
        attempts=carried.attempts,
        history=carried.history,
    )
