"""Snapshots as rows; what one keeps are deliveries that nobody is given.

So a message is stored once, however many snapshots and subscriptions hold it.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from services.queueing.resources import Priority, Snapshot, snapshot_of
from services.runtime.errors import AlreadyExistsError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.resources import Subscription

_COLUMNS = "name, topic, filter, expires, labels, created"
_NEVER = 1e15


def holder(name: str) -> str:
    """Under which a snapshot's deliveries are: no subscription has such a name."""
    return f"@{name}"


class Snapshots:
    """Makes, keeps and restores. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._db = database.connection
        self._catalogue = catalogue
        self._known: list[Snapshot] | None = None
        self._next_expiry = 0.0
        database.on_rollback.append(self.forget)

    def forget(self) -> None:
        """Read again from the file what was remembered."""
        self._known = None

    def _every(self) -> list[Snapshot]:
        """All that have not expired."""
        now = time.time()
        if self._known is None or now >= self._next_expiry:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM snapshots").fetchall()  # noqa: S608 - constant
            every = [_snapshot(row) for row in rows]
            for old in every:
                if old.expires <= now:
                    self._delete(old.name)
            self._known = [snapshot for snapshot in every if snapshot.expires > now]
            self._next_expiry = min((snapshot.expires for snapshot in self._known), default=_NEVER)
        return self._known

    # What exists.

    def create(self, name: str, subscription: str, labels: Mapping[str, str]) -> Snapshot:
        """Keep what a subscription holds."""
        found = self._catalogue.attached(subscription)
        self._every()
        (oldest,) = self._db.execute(
            "SELECT min(m.published) FROM deliveries d JOIN messages m ON m.id = d.message"
            " WHERE d.subscription = ?",
            (subscription,),
        ).fetchone()
        created = snapshot_of(name, found, labels, oldest=oldest or 0.0, now=time.time())
        inserted = self._db.execute(
            f"INSERT INTO snapshots ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",  # noqa: S608 - constant
            _row(created),
        )
        if inserted.rowcount == 0:
            raise AlreadyExistsError(
                f"snapshot {name!r} exists", reason="SNAPSHOT_EXISTS", metadata={"snapshot": name}
            )
        self._db.execute(
            "INSERT INTO deliveries (subscription, message, due, size, priority, not_before)"
            " SELECT ?, message, ?, size, priority, not_before FROM deliveries WHERE subscription = ?",
            (holder(name), _NEVER, subscription),
        )
        self._hold(holder(name))
        self.forget()
        return created

    def get(self, name: str) -> Snapshot:
        """Read a snapshot."""
        for snapshot in self._every():
            if snapshot.name == name:
                return snapshot
        raise NotFoundError(f"no snapshot {name!r}", reason="SNAPSHOT_NOT_FOUND", metadata={"snapshot": name})

    def page(self, topic: str, limit: int, after: str) -> list[Snapshot]:
        """Read snapshots in order of names."""
        found = [s for s in self._every() if s.name > after and topic in {"", s.topic}]
        return sorted(found, key=lambda snapshot: snapshot.name)[:limit]

    def update(self, snapshot: Snapshot) -> Snapshot:
        """Replace labels and expiry."""
        present = self.get(snapshot.name)
        present.check_change(snapshot, time.time())
        changed = replace(snapshot, created=present.created)
        query = f"INSERT OR REPLACE INTO snapshots ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608 - constant
        self._db.execute(query, _row(changed))
        self.forget()
        return changed

    def delete(self, name: str) -> None:
        """Delete a snapshot with what it keeps."""
        self.get(name)
        self._delete(name)
        self.forget()

    def _delete(self, name: str) -> None:
        self.release(holder(name))
        self._db.execute("DELETE FROM snapshots WHERE name = ?", (name,))

    # What they keep.

    def keepers(self, topic: str, attributes: dict[str, str]) -> Sequence[str]:
        """Snapshots that keep a message published to a topic."""
        return [snapshot.name for snapshot in self._every() if snapshot.keeps(topic, attributes)]

    def restore(self, snapshot: Snapshot, subscription: Subscription) -> None:
        """Let an emptied subscription hold what a snapshot keeps."""
        self.give(holder(snapshot.name), subscription)
        self._hold(subscription.name)

    def give(self, held_by: str, subscription: Subscription, published_from: float = 0.0) -> None:
        """Let an emptied subscription hold what a holder holds, without counting it among the holders."""
        rows = self._db.execute(
            "SELECT d.message, d.size, d.not_before, m.priority, m.ordering_key,"
            " CASE WHEN ? THEN m.attributes END FROM deliveries d JOIN messages m ON m.id = d.message"
            " WHERE d.subscription = ? AND m.published >= ? ORDER BY d.message",
            (bool(subscription.filter), held_by, published_from),
        )
        self._db.executemany(
            "INSERT INTO deliveries (subscription, message, size, priority, ordering_key, due, not_before,"
            " expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            _restored(rows, subscription, time.time()),
        )

    def _hold(self, name: str) -> None:
        """Count one more holder of each message of a holder that was not counted."""
        self._db.execute(
            "INSERT INTO shares SELECT message, 2 FROM deliveries WHERE subscription = ?"
            " ON CONFLICT (message) DO UPDATE SET holders = holders + 1",
            (name,),
        )

    def release(self, name: str, condition: str = "", values: tuple[Any, ...] = ()) -> None:
        """Be done with everything that a subscription or a snapshot holds, or with what a condition names."""
        held, bound = f"subscription = ? {condition}", (name, *values)
        self.let_go(f"SELECT message FROM deliveries WHERE {held}", bound)  # noqa: S608 - constants; values are bound
        self._db.execute(f"DELETE FROM deliveries WHERE {held}", bound)  # noqa: S608 - as above

    def let_go(self, numbers: str, bound: tuple[Any, ...]) -> None:
        """Count one holder less of messages, given as a query or a value; forget those that nobody holds."""
        for statement in (
            "DELETE FROM messages WHERE id IN ({}) AND NOT EXISTS (SELECT 1 FROM shares WHERE message = id)",
            "UPDATE shares SET holders = holders - 1 WHERE message IN ({})",
            "DELETE FROM shares WHERE holders = 1 AND message IN ({})",
        ):
            self._db.execute(statement.format(numbers), bound)


def _restored(
    rows: Iterator[tuple[Any, ...]], subscription: Subscription, now: float
) -> Iterator[tuple[Any, ...]]:
    behind: set[str] = set()
    for number, size, not_before, priority, key, attributes in rows:
        if attributes is not None and not subscription.wants(json.loads(attributes)):
            continue
        due = max(now, not_before)
        expires = due + subscription.ttl_s if subscription.ttl_s else None
        if not subscription.ordered:
            yield subscription.name, number, size, priority, "", due, due, expires
            continue
        first = not key or key not in behind
        behind.add(key)
        yield (
            *(subscription.name, number, size, int(Priority.NORMAL), key),
            *(due if first else _NEVER, due, expires),
        )


def _row(snapshot: Snapshot) -> tuple[Any, ...]:
    return (
        *(snapshot.name, snapshot.topic, snapshot.filter, snapshot.expires),
        *(json.dumps(snapshot.labels), snapshot.created),
    )


def _snapshot(row: tuple[Any, ...]) -> Snapshot:
    name, topic, expression, expires, labels, created = row
    return Snapshot(name, topic, expression, expires, json.loads(labels), created)
