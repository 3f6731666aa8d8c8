"""Leases: handing messages out, taking them back, giving them up."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING

from services.queueing.backends.sqlite.batch import PARKED, STORED
from services.queueing.backends.sqlite.messages import Messages, retry_from, stored
from services.queueing.domain import MAX_HISTORY, MAX_REASON, Delivery, Refusal, Stats
from services.queueing.metrics import GIVEN_UP, LEASES_EXPIRED
from services.queueing.resources import Priority

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.backends.sqlite.dead_letters import DeadLetters
    from services.queueing.resources import Subscription

LEASE_EXPIRED = "lease expired"
TTL_EXPIRED = "expired"
_SWEEP = 500
_LEVELS = sorted(Priority, reverse=True)


class Deliveries:
    """What subscriptions hold. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(
        self, database: Database, catalogue: Catalogue, messages: Messages, dead: DeadLetters
    ) -> None:
        self._database = database
        self._db = database.connection
        self._catalogue = catalogue
        self._messages = messages
        self._dead = dead

    def lease(self, name: str, max_messages: int, max_bytes: int) -> tuple[list[Delivery], float | None]:
        """Hand out what is due, highest priority first; if nothing is, say when something will be."""
        subscription = self._catalogue.attached(name)
        now = time.time()
        self.sweep(subscription, now)
        leases: list[tuple[str, int, float, str, int]] = []
        total, until = 0, now + subscription.ack_deadline_s
        for message, size, attempts, lease in self._due(name, now, max_messages):
            if lease is not None and self.failed(subscription, message, LEASE_EXPIRED, now) is None:
                continue
            if leases and total + size > max_bytes:
                break
            total += size
            leases.append((uuid.uuid4().hex, attempts + 1, until, name, message))
        if not leases:
            return [], self._earliest(name)
        self._db.executemany(
            "UPDATE deliveries SET lease = ?, attempts = ?, due = ? WHERE subscription = ? AND message = ?",
            leases,
        )
        found = self._db.execute(
            f"SELECT id, {STORED} FROM messages WHERE id IN (SELECT value FROM json_each(?))",  # noqa: S608 - constant
            (json.dumps([entry[-1] for entry in leases]),),
        )
        messages = {number: stored(row) for number, *row in found}
        return [Delivery(entry[0], messages[entry[-1]], entry[1]) for entry in leases], None

    def _due(self, name: str, now: float, limit: int) -> list[tuple[int, int, int, str | None]]:
        found: list[tuple[int, int, int, str | None]] = []
        for level in _LEVELS:
            found += self._db.execute(
                "SELECT message, size, attempts, lease FROM deliveries"
                " WHERE subscription = ? AND priority = ? AND due <= ? AND (expires IS NULL OR expires > ?)"
                " ORDER BY due, message LIMIT ?",
                (name, int(level), now, now, limit - len(found)),
            ).fetchall()
            if len(found) >= limit:
                break
        return found

    def _earliest(self, name: str) -> float | None:
        times = [
            self._db.execute(
                "SELECT min(due) FROM deliveries WHERE subscription = ? AND priority = ?", (name, int(level))
            ).fetchone()[0]
            for level in _LEVELS
        ]
        return min((due for due in times if due is not None and due < PARKED), default=None)

    def sweep(self, subscription: Subscription, now: float) -> None:
        """Give up messages that have waited too long and are with no consumer."""
        rows = self._db.execute(
            "SELECT message FROM deliveries WHERE subscription = ? AND expires <= ?"
            " AND (lease IS NULL OR due <= ?) ORDER BY expires LIMIT ?",
            (subscription.name, now, now, _SWEEP),
        ).fetchall()
        for (message,) in rows:
            self.failed(subscription, message, TTL_EXPIRED, now, dead=True)

    def failed(
        self, subscription: Subscription, message: int, reason: str, now: float, *, dead: bool = False
    ) -> float | None:
        """Note a failed attempt: the pause until the next in seconds, or None if the message is given up."""
        history_text, attempts, retry_text = self._db.execute(
            "SELECT d.history, d.attempts, m.retry FROM deliveries d JOIN messages m ON m.id = d.message"
            " WHERE d.subscription = ? AND d.message = ?",
            (subscription.name, message),
        ).fetchone()
        if reason == LEASE_EXPIRED:
            LEASES_EXPIRED.add(subscription.name)
        policy = retry_from(retry_text) or subscription.retry
        history = json.dumps([*json.loads(history_text), [now, reason]][-MAX_HISTORY:])
        if not dead and attempts < policy.max_attempts:
            self._db.execute(
                "UPDATE deliveries SET history = ?, lease = NULL WHERE subscription = ? AND message = ?",
                (history, subscription.name, message),
            )
            return policy.pause_s(attempts)
        row = self._db.execute(f"SELECT {STORED}, retry FROM messages WHERE id = ?", (message,)).fetchone()  # noqa: S608 - constant
        self._dead.bury(subscription, row, reason, now, attempts, history)
        GIVEN_UP.add(subscription.name)
        self._messages.drop(subscription.name, message)
        return None

    def _leased(self, subscription: str, ack_ids: Iterable[str]) -> Iterator[tuple[str, int | None]]:
        """Each id with its message, or None if its lease has ended or is another's."""
        now = time.time()
        for ack_id in ack_ids:
            row = self._db.execute(
                "SELECT message FROM deliveries WHERE lease = ? AND subscription = ? AND due > ?",
                (ack_id, subscription, now),
            ).fetchone()
            yield ack_id, row[0] if row else None

    def acknowledge(self, name: str, ack_ids: Sequence[str]) -> list[str]:
        """Be done with messages."""
        if not self._catalogue.subscription(name).retain_acked:
            ended = self._messages.drop_leased(name, ack_ids, time.time())
            return [ack_id for ack_id in ack_ids if ack_id not in ended]
        expired = []
        for ack_id, message in self._leased(name, ack_ids):
            if message is None:
                expired.append(ack_id)
            else:
                self._messages.drop(name, message)
        return expired

    def nack(self, name: str, refusals: Sequence[Refusal]) -> list[str]:
        """Take messages back."""
        subscription = self._catalogue.subscription(name)
        now = time.time()
        expired = []
        found = self._leased(name, (refusal.ack_id for refusal in refusals))
        for refusal, (ack_id, message) in zip(refusals, found, strict=True):
            if message is None:
                expired.append(ack_id)
                continue
            reason = refusal.reason[:MAX_REASON] or "not acknowledged"
            pause = self.failed(subscription, message, reason, now, dead=refusal.dead)
            if pause is not None:
                self._set_due(name, message, now + (pause if refusal.delay_s is None else refusal.delay_s))
        self._database.touched.add(name)
        return expired

    def extend(self, name: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end."""
        self._catalogue.subscription(name)
        now = time.time()
        expired = []
        found = self._leased(name, (ack_id for ack_id, _ in leases))
        for (_, seconds), (ack_id, message) in zip(leases, found, strict=True):
            if message is None:
                expired.append(ack_id)
            elif seconds > 0:
                self._set_due(name, message, now + seconds)
            else:
                self._db.execute(
                    "UPDATE deliveries SET due = ?, lease = NULL, attempts = attempts - 1"
                    " WHERE subscription = ? AND message = ?",
                    (now, name, message),
                )
                self._database.touched.add(name)
        return expired

    def _set_due(self, name: str, message: int, due: float) -> None:
        self._db.execute(
            "UPDATE deliveries SET due = ? WHERE subscription = ? AND message = ?", (due, name, message)
        )

    def stats(self, name: str, now: float) -> Stats:
        """Count what a subscription holds."""
        return count(self._db, name, now)


def count(db: sqlite3.Connection, name: str, now: float) -> Stats:
    """Count what a subscription holds; one behind another of its key is ready when its time has come."""
    ready, leased, delayed, oldest = db.execute(
        "SELECT count(*) FILTER (WHERE due <= :now OR (due = :parked AND not_before <= :now)),"
        " count(*) FILTER (WHERE due > :now AND lease NOT NULL),"
        " count(*) FILTER (WHERE due > :now AND lease IS NULL"
        "   AND NOT (due = :parked AND not_before <= :now)), min(message)"
        " FROM deliveries WHERE subscription = :name",
        {"now": now, "name": name, "parked": PARKED},
    ).fetchone()
    (dead,) = db.execute("SELECT count(*) FROM dead_letters WHERE subscription = ?", (name,)).fetchone()
    published = db.execute("SELECT published FROM messages WHERE id = ?", (oldest,)).fetchone()
    return Stats(ready, leased, delayed, dead, published[0] if published else 0.0)
