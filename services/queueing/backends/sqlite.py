"""A broker in one SQLite file.

A delivery row has one time, `due`: when the message may next be handed out. For a fresh message that is now,
for a delayed or failed one later, for a leased one the end of the lease. So waiting, delays, back-off and
lost consumers are one indexed query, and nothing polls: a puller sleeps until the earliest due time or the
next publish.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from services.queueing.domain import (
    MAX_BATCH,
    MAX_HISTORY,
    MAX_LEASE_S,
    MAX_REASON,
    Backoff,
    DeadLetter,
    Delivery,
    Message,
    Refusal,
    RetryPolicy,
    Stats,
    Subscription,
    Topic,
    check_messages,
    check_name,
)
from services.runtime.disk import full_disk, is_full
from services.runtime.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    PlexusError,
)
from services.runtime.group_commit import GroupCommit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

_SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS subscriptions (
    name TEXT PRIMARY KEY, topic TEXT NOT NULL, ack_deadline_s REAL NOT NULL, backoff TEXT NOT NULL,
    minimum_s REAL NOT NULL, maximum_s REAL NOT NULL, max_attempts INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS subscriptions_by_topic ON subscriptions (topic);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL, topic TEXT NOT NULL, data BLOB NOT NULL,
    attributes TEXT NOT NULL, published REAL NOT NULL, holders INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS deliveries (
    subscription TEXT NOT NULL, message INTEGER NOT NULL, due REAL NOT NULL, size INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, lease TEXT, history TEXT NOT NULL DEFAULT '[]',
    PRIMARY KEY (subscription, message)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_by_due ON deliveries (subscription, due, message);
CREATE INDEX IF NOT EXISTS deliveries_by_lease ON deliveries (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, subscription TEXT NOT NULL, message_id TEXT NOT NULL,
    topic TEXT NOT NULL, data BLOB NOT NULL, attributes TEXT NOT NULL, published REAL NOT NULL,
    died REAL NOT NULL, reason TEXT NOT NULL, history TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS dead_letters_by_subscription ON dead_letters (subscription, id);
CREATE TABLE IF NOT EXISTS dedup (
    topic TEXT NOT NULL, dedup_id TEXT NOT NULL, message_id TEXT NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (topic, dedup_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dedup_by_age ON dedup (seen);
"""
_MAX_GROUP = 512
_EXPIRED = "lease expired"
_WAIT_BOUND_S = 60.0

Job = Callable[[], object]


class SqliteBroker:
    """The embedded Broker; open it with `async with`."""

    def __init__(
        self, file: Path, *, dedup_window_s: float = 600.0, max_waiting_writes: int = 20_000
    ) -> None:
        """Open the file, made if need be.

        Args:
            file: The database.
            dedup_window_s: How long deduplication ids are remembered.
            max_waiting_writes: Calls that may wait for the disk.
        """
        self._dedup_window_s = dedup_window_s
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        # A commit is on the disk when it returns: what is acknowledged survives the loss of power.
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)
        self._commits: GroupCommit[Job] = GroupCommit(
            self._commit, name="queueing", max_group_size=_MAX_GROUP, max_waiting=max_waiting_writes
        )
        self._news: dict[str, asyncio.Event] = {}

    async def __aenter__(self) -> Self:
        """Start the writer."""
        await self._commits.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what was taken and close."""
        await self._commits.__aexit__(kind, error, trace)
        self._db.close()

    def _commit(self, jobs: Sequence[Job]) -> list[object]:
        """Run jobs in one transaction; each in a savepoint, so that one's failure is its own."""
        results: list[object] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._db.execute("SAVEPOINT job")
                try:
                    results.append(job())
                except PlexusError as error:
                    self._db.execute("ROLLBACK TO job")
                    results.append(error)
                self._db.execute("RELEASE job")
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if is_full(error):
                raise full_disk() from error
            raise
        return results

    def _wake(self, subscriptions: Sequence[str]) -> None:
        for name in subscriptions:
            event = self._news.pop(name, None)
            if event is not None:
                event.set()

    # Topics and subscriptions.

    async def create_topic(self, name: str) -> Topic:
        """See Broker."""
        check_name(name, "topic")

        def job() -> Topic:
            topic = Topic(name, time.time())
            try:
                self._db.execute("INSERT INTO topics VALUES (?, ?)", (topic.name, topic.created))
            except sqlite3.IntegrityError as error:
                raise AlreadyExistsError(
                    f"topic {name!r} exists", reason="TOPIC_EXISTS", metadata={"topic": name}
                ) from error
            return topic

        topic: Topic = await self._commits.submit(job)
        return topic

    def _topic(self, name: str) -> Topic:
        row = self._db.execute("SELECT name, created FROM topics WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFoundError(f"no topic {name!r}", reason="TOPIC_NOT_FOUND", metadata={"topic": name})
        return Topic(*row)

    async def get_topic(self, name: str) -> Topic:
        """See Broker."""
        topic: Topic = await self._commits.submit(lambda: self._topic(name))
        return topic

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """See Broker."""
        query = "SELECT name, created FROM topics WHERE name > ? ORDER BY name LIMIT ?"
        rows = await self._commits.submit(lambda: self._db.execute(query, (after, limit)).fetchall())
        return [Topic(*row) for row in rows]

    async def delete_topic(self, name: str) -> None:
        """See Broker."""

        def job() -> None:
            self._topic(name)
            self._db.execute("DELETE FROM topics WHERE name = ?", (name,))
            self._db.execute("DELETE FROM dedup WHERE topic = ?", (name,))

        await self._commits.submit(job)

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""

        def job() -> Subscription:
            self._topic(subscription.topic)
            row = self._db.execute(
                "SELECT * FROM subscriptions WHERE name = ?", (subscription.name,)
            ).fetchone()
            if row is not None:
                present = _subscription(row)
                if _settings(present) == _settings(subscription):
                    return present
                raise AlreadyExistsError(
                    f"subscription {subscription.name!r} exists with other settings",
                    reason="SUBSCRIPTION_EXISTS",
                    metadata={"subscription": subscription.name},
                )
            values = (*_settings(subscription), time.time())
            self._db.execute("INSERT INTO subscriptions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            return self._subscription(subscription.name)

        created: Subscription = await self._commits.submit(job)
        return created

    def _subscription(self, name: str) -> Subscription:
        row = self._db.execute("SELECT * FROM subscriptions WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFoundError(
                f"no subscription {name!r}",
                reason="SUBSCRIPTION_NOT_FOUND",
                metadata={"subscription": name},
            )
        return _subscription(row)

    async def get_subscription(self, name: str) -> Subscription:
        """See Broker."""
        subscription: Subscription = await self._commits.submit(lambda: self._subscription(name))
        return subscription

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """See Broker."""
        query = "SELECT * FROM subscriptions WHERE name > ? AND (? = '' OR topic = ?) ORDER BY name LIMIT ?"
        rows = await self._commits.submit(
            lambda: self._db.execute(query, (after, topic, topic, limit)).fetchall()
        )
        return [_subscription(row) for row in rows]

    async def delete_subscription(self, name: str) -> None:
        """See Broker."""

        def job() -> None:
            self._subscription(name)
            held = "SELECT message FROM deliveries WHERE subscription = ?"
            self._db.execute(f"UPDATE messages SET holders = holders - 1 WHERE id IN ({held})", (name,))  # noqa: S608 - constant
            self._db.execute(f"DELETE FROM messages WHERE holders <= 0 AND id IN ({held})", (name,))  # noqa: S608 - constant
            self._db.execute("DELETE FROM deliveries WHERE subscription = ?", (name,))
            self._db.execute("DELETE FROM dead_letters WHERE subscription = ?", (name,))
            self._db.execute("DELETE FROM subscriptions WHERE name = ?", (name,))

        await self._commits.submit(job)
        self._wake([name])

    # Publishing.

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """See Broker."""
        check_messages(messages)
        prepared = [(message, uuid.uuid4().hex, json.dumps(message.attributes)) for message in messages]

        def job() -> tuple[list[str], list[str]]:
            self._topic(topic)
            now = time.time()
            subscribers = [
                row[0] for row in self._db.execute("SELECT name FROM subscriptions WHERE topic = ?", (topic,))
            ]
            ids = [self._store(topic, subscribers, now, *entry) for entry in prepared]
            return ids, subscribers

        ids, subscribers = await self._commits.submit(job)
        self._wake(subscribers)
        result: list[str] = ids
        return result

    def _store(
        self,
        topic: str,
        subscribers: list[str],
        now: float,
        message: Message,
        message_id: str,
        attributes: str,
    ) -> str:
        if message.dedup_id:
            self._db.execute("DELETE FROM dedup WHERE seen < ?", (now - self._dedup_window_s,))
            row = self._db.execute(
                "SELECT message_id FROM dedup WHERE topic = ? AND dedup_id = ?", (topic, message.dedup_id)
            ).fetchone()
            if row:
                return str(row[0])
            self._db.execute(
                "INSERT INTO dedup VALUES (?, ?, ?, ?)", (topic, message.dedup_id, message_id, now)
            )
        if subscribers:
            cursor = self._db.execute(
                "INSERT INTO messages (message_id, topic, data, attributes, published, holders)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (message_id, topic, message.data, attributes, now, len(subscribers)),
            )
            row_id, due, size = cursor.lastrowid, now + message.delay_s, len(message.data)
            for subscriber in subscribers:
                self._db.execute(
                    "INSERT INTO deliveries (subscription, message, due, size) VALUES (?, ?, ?, ?)",
                    (subscriber, row_id, due, size),
                )
        return message_id

    # Consuming.

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """See Broker."""
        if not 1 <= max_messages <= MAX_BATCH:
            raise InvalidArgumentError(f"must be 1 to {MAX_BATCH}", field="max_messages")
        deadline = time.monotonic() + min(wait_s, _WAIT_BOUND_S)
        while True:
            # Before the look, so that a publish in between is not missed.
            news = self._news.setdefault(subscription, asyncio.Event())
            deliveries, earliest = await self._commits.submit(
                lambda: self._lease(subscription, max_messages, max_bytes)
            )
            left = deadline - time.monotonic()
            if deliveries or left <= 0:
                found: list[Delivery] = deliveries
                return found
            pause = left if earliest is None else min(left, max(0.0, earliest - time.time()))
            try:
                async with asyncio.timeout(pause):
                    await news.wait()
            except TimeoutError:
                continue  # something is due, or the wait is over

    def _lease(self, name: str, max_messages: int, max_bytes: int) -> tuple[list[Delivery], float | None]:
        subscription = self._subscription(name)
        now = time.time()
        deliveries: list[Delivery] = []
        total = 0
        rows = self._db.execute(
            "SELECT message, size, attempts, lease FROM deliveries WHERE subscription = ? AND due <= ?"
            " ORDER BY due, message LIMIT ?",
            (name, now, max_messages),
        ).fetchall()
        for message, size, attempts, lease in rows:
            if lease is not None and not self._failed(subscription, message, attempts, _EXPIRED, now):
                continue
            if deliveries and total + size > max_bytes:
                break
            total += size
            token = uuid.uuid4().hex
            self._db.execute(
                "UPDATE deliveries SET lease = ?, attempts = ?, due = ?"
                " WHERE subscription = ? AND message = ?",
                (token, attempts + 1, now + subscription.ack_deadline_s, name, message),
            )
            message_id, data, attributes, published = self._db.execute(
                "SELECT message_id, data, attributes, published FROM messages WHERE id = ?", (message,)
            ).fetchone()
            deliveries.append(
                Delivery(token, message_id, data, json.loads(attributes), published, attempts + 1)
            )
        if deliveries:
            return deliveries, None
        (earliest,) = self._db.execute(
            "SELECT min(due) FROM deliveries WHERE subscription = ?", (name,)
        ).fetchone()
        return [], earliest

    def _failed(
        self,
        subscription: Subscription,
        message: int,
        attempts: int,
        reason: str,
        now: float,
        *,
        dead: bool = False,
    ) -> bool:
        """Note a failed attempt; true if the message may be tried again, false if it is now a dead letter."""
        row = self._db.execute(
            "SELECT history FROM deliveries WHERE subscription = ? AND message = ?",
            (subscription.name, message),
        ).fetchone()
        history = json.dumps([*json.loads(row[0]), [now, reason]][-MAX_HISTORY:])
        if not dead and attempts < subscription.retry.max_attempts:
            self._db.execute(
                "UPDATE deliveries SET history = ?, lease = NULL WHERE subscription = ? AND message = ?",
                (history, subscription.name, message),
            )
            return True
        self._db.execute(
            "INSERT INTO dead_letters (subscription, message_id, topic, data, attributes, published, died,"
            " reason, history) SELECT ?, message_id, topic, data, attributes, published, ?, ?, ?"
            " FROM messages WHERE id = ?",
            (subscription.name, now, reason, history, message),
        )
        self._drop(subscription.name, message)
        return False

    def _drop(self, subscription: str, message: int) -> None:
        self._db.execute(
            "DELETE FROM deliveries WHERE subscription = ? AND message = ?", (subscription, message)
        )
        self._db.execute("UPDATE messages SET holders = holders - 1 WHERE id = ?", (message,))
        self._db.execute("DELETE FROM messages WHERE id = ? AND holders <= 0", (message,))

    def _leased(
        self, subscription: str, ack_ids: Iterator[str]
    ) -> Iterator[tuple[str, tuple[int, int] | None]]:
        """Each id with its message and attempts, or None if its lease has ended or is another's."""
        now = time.time()
        for ack_id in ack_ids:
            row = self._db.execute(
                "SELECT message, attempts FROM deliveries WHERE lease = ? AND subscription = ? AND due > ?",
                (ack_id, subscription, now),
            ).fetchone()
            yield ack_id, row

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        """See Broker."""

        def job() -> list[str]:
            self._subscription(subscription)
            expired = []
            for ack_id, row in self._leased(subscription, iter(ack_ids)):
                if row is None:
                    expired.append(ack_id)
                else:
                    self._drop(subscription, row[0])
            return expired

        expired: list[str] = await self._commits.submit(job)
        return expired

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        """See Broker."""

        def job() -> list[str]:
            settings = self._subscription(subscription)
            now = time.time()
            expired = []
            found = self._leased(subscription, (refusal.ack_id for refusal in refusals))
            for refusal, (ack_id, row) in zip(refusals, found, strict=True):
                if row is None:
                    expired.append(ack_id)
                    continue
                message, attempts = row
                reason = refusal.reason[:MAX_REASON] or "not acknowledged"
                if self._failed(settings, message, attempts, reason, now, dead=refusal.dead):
                    pause = settings.retry.pause_s(attempts) if refusal.delay_s is None else refusal.delay_s
                    self._db.execute(
                        "UPDATE deliveries SET due = ? WHERE subscription = ? AND message = ?",
                        (now + pause, subscription, message),
                    )
            return expired

        expired: list[str] = await self._commits.submit(job)
        self._wake([subscription])
        return expired

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """See Broker."""
        for _, seconds in leases:
            if not 0 <= seconds <= MAX_LEASE_S:
                raise InvalidArgumentError("must be 0 to 1 h", field="deadline")

        def job() -> list[str]:
            self._subscription(subscription)
            now = time.time()
            expired = []
            found = self._leased(subscription, (ack_id for ack_id, _ in leases))
            for (_, seconds), (ack_id, row) in zip(leases, found, strict=True):
                if row is None:
                    expired.append(ack_id)
                elif seconds > 0:
                    self._db.execute(
                        "UPDATE deliveries SET due = ? WHERE subscription = ? AND message = ?",
                        (now + seconds, subscription, row[0]),
                    )
                else:
                    self._db.execute(
                        "UPDATE deliveries SET due = ?, lease = NULL, attempts = attempts - 1"
                        " WHERE subscription = ? AND message = ?",
                        (now, subscription, row[0]),
                    )
            return expired

        expired: list[str] = await self._commits.submit(job)
        if any(seconds == 0 for _, seconds in leases):
            self._wake([subscription])
        return expired

    # Dead letters.

    async def list_dead_letters(self, subscription: str, *, limit: int, after: int = 0) -> list[DeadLetter]:
        """See Broker."""

        def job() -> list[DeadLetter]:
            self._subscription(subscription)
            rows = self._db.execute(
                "SELECT id, message_id, topic, data, attributes, published, died, reason, history"
                " FROM dead_letters WHERE subscription = ? AND id > ? ORDER BY id LIMIT ?",
                (subscription, after, limit),
            )
            return [_dead_letter(row) for row in rows]

        letters: list[DeadLetter] = await self._commits.submit(job)
        return letters

    def _chosen(self, subscription: str, ids: Sequence[str]) -> list[int]:
        self._subscription(subscription)
        every = self._db.execute("SELECT id FROM dead_letters WHERE subscription = ?", (subscription,))
        wanted = set(ids)
        return [row[0] for row in every if not wanted or str(row[0]) in wanted]

    async def redrive(self, subscription: str, ids: Sequence[str]) -> int:
        """See Broker."""

        def job() -> int:
            chosen = self._chosen(subscription, ids)
            now = time.time()
            for letter in chosen:
                cursor = self._db.execute(
                    "INSERT INTO messages (message_id, topic, data, attributes, published, holders)"
                    " SELECT message_id, topic, data, attributes, published, 1 FROM dead_letters"
                    " WHERE id = ?",
                    (letter,),
                )
                self._db.execute(
                    "INSERT INTO deliveries (subscription, message, due, size)"
                    " SELECT ?, ?, ?, length(data) FROM dead_letters WHERE id = ?",
                    (subscription, cursor.lastrowid, now, letter),
                )
                self._db.execute("DELETE FROM dead_letters WHERE id = ?", (letter,))
            return len(chosen)

        count: int = await self._commits.submit(job)
        self._wake([subscription])
        return count

    async def purge(self, subscription: str, ids: Sequence[str]) -> int:
        """See Broker."""

        def job() -> int:
            chosen = self._chosen(subscription, ids)
            self._db.executemany("DELETE FROM dead_letters WHERE id = ?", [(letter,) for letter in chosen])
            return len(chosen)

        count: int = await self._commits.submit(job)
        return count

    async def stats(self, subscription: str) -> Stats:
        """See Broker."""

        def job() -> Stats:
            self._subscription(subscription)
            now = time.time()
            ready, leased, delayed = self._db.execute(
                "SELECT count(*) FILTER (WHERE due <= :now),"
                " count(*) FILTER (WHERE due > :now AND lease NOT NULL),"
                " count(*) FILTER (WHERE due > :now AND lease IS NULL)"
                " FROM deliveries WHERE subscription = :name",
                {"now": now, "name": subscription},
            ).fetchone()
            (dead,) = self._db.execute(
                "SELECT count(*) FROM dead_letters WHERE subscription = ?", (subscription,)
            ).fetchone()
            return Stats(ready, leased, delayed, dead)

        stats: Stats = await self._commits.submit(job)
        return stats


def _dead_letter(row: tuple[Any, ...]) -> DeadLetter:
    letter_id, message_id, topic, data, attributes, published, died, reason, history = row
    return DeadLetter(
        id=str(letter_id),
        message_id=message_id,
        topic=topic,
        data=data,
        attributes=json.loads(attributes),
        published=published,
        died=died,
        reason=reason,
        history=[(when, why) for when, why in json.loads(history)],
    )


def _settings(subscription: Subscription) -> tuple[Any, ...]:
    retry = subscription.retry
    return (
        *(subscription.name, subscription.topic, subscription.ack_deadline_s),
        *(retry.backoff.value, retry.minimum_s, retry.maximum_s, retry.max_attempts),
    )


def _subscription(row: tuple[Any, ...]) -> Subscription:
    name, topic, ack_deadline_s, backoff, minimum_s, maximum_s, max_attempts, created = row
    retry = RetryPolicy(Backoff(backoff), minimum_s, maximum_s, max_attempts)
    return Subscription(name, topic, ack_deadline_s, retry, created)
