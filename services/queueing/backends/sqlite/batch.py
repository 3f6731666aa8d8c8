"""Messages on their way into the tables, written together: a statement for each would cost more than they."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.queueing.backends.sqlite.snapshots import holder
from services.queueing.resources import Priority

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from services.queueing.resources import Subscription

STORED = "message_id, topic, data, attributes, published, ordering_key, priority, correlation_id"
"""Columns that messages, dead letters and events have in common; `retry` goes along."""
PARKED = 1e15
"""The due time of a message that waits for the one before it, and of those of snapshots."""


class Batch:
    """Gathers messages with their deliveries, and stores them in `write`, before another batch is begun."""

    def __init__(self, connection: sqlite3.Connection, touched: set[str]) -> None:
        """Begin one.

        Args:
            connection: In a transaction.
            touched: Subscriptions with news; added to.
        """
        self._db = connection
        self._touched = touched
        self._messages: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._shares: list[tuple[int, int]] = []
        self._lines: set[tuple[str, str]] = set()
        ((self._last,),) = connection.execute(
            "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'messages'"
        ).fetchall()

    def add(
        self,
        row: tuple[Any, ...],
        takers: Sequence[Subscription],
        now: float,
        due: float,
        ttl_s: float = 0,
        *,
        keepers: Sequence[str] = (),
    ) -> None:
        """Take a message, given as the columns STORED and its policy.

        Args:
            row: Of the message.
            takers: Subscriptions that get it.
            now: Seconds since 1970.
            due: When it may be handed out, seconds since 1970.
            ttl_s: How long it may wait after that; if 0, as long as each subscription says.
            keepers: Snapshots that keep it.
        """
        holders = len(takers) + len(keepers)
        if not holders:
            return
        self._last += 1
        number, size, key, priority = self._last, len(row[2]), row[5], row[6]
        self._messages.append((number, *row))
        if holders > 1:
            self._shares.append((number, holders))
        normal = int(Priority.NORMAL)
        for name in keepers:
            self._deliveries.append((holder(name), number, PARKED, size, normal, "", due, None))
        for taker in takers:
            lives_s = ttl_s or taker.ttl_s
            expires = max(now, due) + lives_s if lives_s else None
            if taker.ordered:  # order is stronger than priority
                first = PARKED if key and self._waits(taker.name, key) else due
                entry = (taker.name, number, first, size, normal, key, due, expires)
            else:
                entry = (taker.name, number, due, size, priority, "", due, expires)
            self._deliveries.append(entry)
            self._touched.add(taker.name)

    def _waits(self, subscription: str, key: str) -> bool:
        """Whether others of its key are before it; from now on there are."""
        line = (subscription, key)
        if line in self._lines:
            return True
        self._lines.add(line)
        query = "SELECT 1 FROM deliveries WHERE subscription = ? AND ordering_key = ? AND ordering_key != ''"
        return self._db.execute(f"{query} LIMIT 1", line).fetchone() is not None

    def write(self) -> None:
        """Store what was taken."""
        if not self._messages:
            return
        self._db.executemany(
            f"INSERT INTO messages (id, {STORED}, retry, holders) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",  # noqa: S608 - constant
            self._messages,
        )
        if self._shares:
            self._db.executemany("INSERT INTO shares VALUES (?, ?)", self._shares)
        self._db.executemany(
            "INSERT INTO deliveries (subscription, message, due, size, priority, ordering_key, not_before,"
            " expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            self._deliveries,
        )
