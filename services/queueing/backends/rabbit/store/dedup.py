"""Deduplication ids: who publishes, and what was published."""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING

from sqlalchemy import case, or_, select, update

from services.queueing.backends.rabbit.state import REPLICA, Reservation
from services.queueing.backends.rabbit.store.tables import DEDUP
from services.queueing.state.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import ColumnElement

    from services.queueing.resources import Topic
    from services.queueing.state import Database

_ROWS = 500
"""Of one statement: SQLite binds at most 32 766 values."""


def key_of(topic: Topic, dedup_id: str) -> str:
    """Under which a deduplication id is kept; a topic that is made again knows none of its predecessor's."""
    return hashlib.sha256(f"{topic.name}\0{topic.created!r}\0{dedup_id}".encode()).hexdigest()


class Dedup:
    """Keeps ids for a window of time."""

    def __init__(
        self, database: Database, *, window_s: float, hold_s: float, holder: Callable[[], str] = str
    ) -> None:
        """Set the times.

        Args:
            database: Where they are.
            window_s: How long an id is remembered.
            hold_s: How long a publisher may take until its message is confirmed.
            holder: The lease with whose end the publisher is taken for dead; empty while it has none.
        """
        self._holder = holder
        self._database = database
        self._window_s = window_s
        self._hold_s = hold_s
        self._token = uuid.uuid4().hex
        self._tokens = {self._token}

    async def recover(self) -> None:
        """At a start, when nobody else has taken ids: nothing is being published, whatever is reserved."""
        async with self._database.transaction() as connection:
            await connection.execute(update(DEDUP).where(DEDUP.c.until > 0).values(until=1))

    async def reserve(self, wanted: Sequence[tuple[str, str]]) -> list[Reservation]:
        """Take ids, given as pairs of `key_of` and the message id; of the same key the first one gets it."""
        first = dict(reversed(wanted))
        # In the order of keys: two replicas that take the same ones never wait for each other.
        keys = sorted(first)
        found: dict[str, Reservation] = {}
        token = self._holder() or self._token
        self._tokens.add(token)
        async with self._database.transaction() as connection:
            now = await self._database.now(connection)
            old = DEDUP.c.seen < now - self._window_s
            statement = self._database.insert(DEDUP)
            given = statement.excluded
            taken = statement.on_conflict_do_update(
                index_elements=[DEDUP.c.key],
                set_={
                    "message_id": case((old, given.message_id), else_=DEDUP.c.message_id),
                    "seen": case((old, given.seen), else_=DEDUP.c.seen),
                    "token": given.token,
                    "until": given.until,
                },
                where=or_(old, (DEDUP.c.until > 0) & or_(DEDUP.c.until <= now, _is_dead(now))),
            ).returning(DEDUP.c.key, DEDUP.c.message_id)
            mine = {"token": token, "until": now + self._hold_s, "seen": now}
            # Rows beside the statement, which is compiled once: within it that cost more than all the rest.
            rows = [{"key": key, "message_id": first[key], **mine} for key in keys]
            for row in await connection.execute(taken, rows):
                found[row.key] = Reservation(row.message_id, ours=True)
            for some in _parts([key for key in keys if key not in found]):
                others = select(DEDUP).where(DEDUP.c.key.in_(some))
                for row in await connection.execute(others):
                    holder = row.token if row.token.startswith(REPLICA) else ""
                    found[row.key] = Reservation(row.message_id, published=row.until == 0, holder=holder)
        results = []
        for key, _ in wanted:
            results.append(found[key])
            # Twice in one group: only the first is published.
            found[key] = Reservation(found[key].message_id, published=found[key].published)
        return results

    async def confirm(self, keys: Sequence[str]) -> list[None]:
        """Remember that messages are with the broker."""
        async with self._database.transaction() as connection:
            for some in _parts(sorted(keys)):
                await connection.execute(update(DEDUP).where(DEDUP.c.key.in_(some)).values(until=0))
        return [None] * len(keys)

    async def release(self, keys: Sequence[str]) -> None:
        """Let the next one publish."""
        async with self._database.transaction() as connection:
            for some in _parts(sorted(keys)):
                ours = DEDUP.c.token.in_(self._tokens) & (DEDUP.c.until > 0)
                await connection.execute(update(DEDUP).where(DEDUP.c.key.in_(some), ours).values(until=1))


def _is_dead(now: float) -> ColumnElement[bool]:
    """Whether an id is a replica's whose lease has ended: it publishes nothing any more."""
    return DEDUP.c.token.startswith(REPLICA, autoescape=True) & Leases.nobody_has(DEDUP.c.token, now)


def _parts(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _ROWS] for start in range(0, len(keys), _ROWS)]
