"""Messages as rows, and the deliveries that hold them.

A delivery has one time, `due`: when the message may next be handed out. For a fresh message that is now, for
a delayed or failed one later, for a leased one the end of the lease, and behind another of its ordering key
never, until that one is gone. So waiting, delays, back-off, order and lost consumers are one indexed query.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from services.queueing.backends.sqlite.batch import PARKED, Batch
from services.queueing.domain import Message, Stored
from services.queueing.identifiers import message_ids
from services.queueing.resources import Backoff, Priority, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.backends.sqlite.events import EventLog
    from services.queueing.backends.sqlite.retained import Retained
    from services.queueing.backends.sqlite.snapshots import Snapshots
    from services.queueing.resources import Subscription

_PART = 5000
"""Messages that are dropped in one job, which others wait for."""


def stored(row: Sequence[Any]) -> Stored:
    """The message in the columns STORED."""
    message_id, topic, data, attributes, published, ordering_key, priority, correlation_id = row
    return Stored(
        message_id=message_id,
        topic=topic,
        data=data,
        attributes=json.loads(attributes) if attributes != "{}" else {},
        published=published,
        ordering_key=ordering_key,
        priority=Priority(priority),
        correlation_id=correlation_id,
    )


def retry_from(text: str | None) -> RetryPolicy | None:
    """A message's own policy."""
    if text is None:
        return None
    fields = json.loads(text)
    return RetryPolicy(**{**fields, "backoff": Backoff(fields["backoff"])})


class Messages:
    """Stores, delivers and drops. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(
        self,
        database: Database,
        catalogue: Catalogue,
        events: EventLog,
        snapshots: Snapshots,
        retained: Retained,
        dedup_window_s: float,
    ) -> None:
        self._database = database
        self._db = database.connection
        self._catalogue = catalogue
        self._events = events
        self._snapshots = snapshots
        self._retained = retained
        self._dedup_window_s = dedup_window_s

    def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """Store messages for every subscription that wants them."""
        subscribers = self._catalogue.subscribers(topic)
        now = time.time()
        if any(message.dedup_id for message in messages):
            self._db.execute("DELETE FROM dedup WHERE seen < ?", (now - self._dedup_window_s,))
        log = self._catalogue.topic(topic) if self._events.keeps(topic) else None
        batch = self._batch()
        ids = []
        for message, message_id in zip(messages, message_ids(len(messages)), strict=True):
            before = self._seen(topic, message, message_id, now) if message.dedup_id else None
            if before is not None:
                ids.append(before)
                continue
            row = self._row(topic, message, message_id, now)
            if log is not None:
                self._events.append(log, row, message.attributes.get("type", ""))
            takers = [s for s in subscribers if s.wants(message.attributes)]
            keepers = self._snapshots.keepers(topic, message.attributes)
            batch.add(row, takers, now, now + message.delay_s, message.ttl_s, keepers=keepers)
            ids.append(message_id)
        batch.write()
        return ids

    def _batch(self) -> Batch:
        return Batch(self._db, self._database.touched)

    def _seen(self, topic: str, message: Message, message_id: str, now: float) -> str | None:
        key = (topic, message.dedup_id)
        found = self._db.execute(
            "SELECT message_id FROM dedup WHERE topic = ? AND dedup_id = ?", key
        ).fetchone()
        if found:
            return str(found[0])
        self._db.execute("INSERT INTO dedup VALUES (?, ?, ?, ?)", (*key, message_id, now))
        return None

    @staticmethod
    def _row(topic: str, message: Message, message_id: str, now: float) -> tuple[Any, ...]:
        attributes = json.dumps(message.attributes) if message.attributes else "{}"
        retry = json.dumps(asdict(message.retry)) if message.retry else None
        return (
            *(message_id, topic, message.data, attributes, now),
            *(message.ordering_key, int(message.priority), message.correlation_id, retry),
        )

    def again(self, row: tuple[Any, ...], subscription: Subscription, due: float) -> None:
        """Store a copy of a message, its id and all, for one subscription."""
        batch = self._batch()
        batch.add(row, [subscription], time.time(), due)
        batch.write()

    def forward(self, row: tuple[Any, ...], topic: str, extra: dict[str, str], due: float) -> bool:
        """Store a copy of a message under another topic; false if nobody there would get it."""
        attributes = {**json.loads(row[3]), **extra}
        takers = [s for s in self._catalogue.subscribers(topic) if s.wants(attributes)]
        if not takers:
            return False
        batch = self._batch()
        moved = (row[0], topic, row[2], json.dumps(attributes), *row[4:])
        if self._events.keeps(topic):
            self._events.append(self._catalogue.topic(topic), moved, attributes.get("type", ""))
        batch.add(moved, takers, time.time(), due, keepers=self._snapshots.keepers(topic, attributes))
        batch.write()
        return True

    def drop(self, subscription: str, number: int) -> None:
        """Be done with a delivery, let the next of its key come, and forget a message nobody waits for."""
        found = self._catalogue.subscription(subscription)
        if found.retain_acked:
            key = self._retained.keep(found, number)
            if key:
                self._promote(subscription, key)
            return
        ((key,),) = self._db.execute(
            "DELETE FROM deliveries WHERE subscription = ? AND message = ? RETURNING ordering_key",
            (subscription, number),
        ).fetchall()
        if key:
            self._promote(subscription, key)
        self._snapshots.let_go("?", (number,))

    def drop_leased(self, subscription: str, leases: Sequence[str], now: float) -> set[str]:
        """Be done with deliveries whose leases have not ended; gives these leases."""
        # INDEXED BY: else all of a subscription is looked at.
        gone = self._db.execute(
            "DELETE FROM deliveries INDEXED BY deliveries_by_lease"
            " WHERE lease IN (SELECT value FROM json_each(?)) AND subscription = ? AND due > ?"
            " RETURNING lease, message, ordering_key",
            (json.dumps(list(leases)), subscription, now),
        ).fetchall()
        numbers = json.dumps([number for _, number, _ in gone])
        self._snapshots.let_go("SELECT value FROM json_each(?)", (numbers,))
        for key in {key for _, _, key in gone if key}:
            self._promote(subscription, key)
        return {lease for lease, _, _ in gone}

    def _promote(self, subscription: str, key: str) -> None:
        self._db.execute(
            "UPDATE deliveries SET due = not_before WHERE due = ? AND subscription = ? AND message ="
            " (SELECT min(message) FROM deliveries"
            " WHERE subscription = ? AND ordering_key = ? AND ordering_key != '')",
            (PARKED, subscription, subscription, key),
        )
        self._database.touched.add(subscription)

    def last(self) -> int:
        """The highest number so far: what is stored from now on has higher ones."""
        found = self._db.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'messages'").fetchone()
        return int(found[0] or 0)

    def drop_part(self, subscription: str, last: int) -> bool:
        """Be done with the oldest that a subscription holds up to a number; whether many more may be."""
        next_part = self._db.execute(
            "SELECT message FROM deliveries WHERE subscription = ? AND message <= ?"
            " ORDER BY message LIMIT 1 OFFSET ?",
            (subscription, last, _PART),
        ).fetchone()
        if next_part is not None:
            self._snapshots.release(subscription, "AND message < ?", next_part)
        return next_part is not None

    def drop_all(self, subscription: str, *, published_before: float | None = None) -> None:
        """Be done with everything that a subscription holds, or with what is older than a time."""
        if published_before is not None:
            numbers = self._db.execute(
                "SELECT d.message FROM deliveries d JOIN messages m ON m.id = d.message"
                " WHERE d.subscription = ? AND m.published < ? ORDER BY d.message",
                (subscription, published_before),
            ).fetchall()
            for (number,) in numbers:
                self.drop(subscription, number)
            return
        self._snapshots.release(subscription)
