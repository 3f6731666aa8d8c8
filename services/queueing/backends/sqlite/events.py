"""The logs of topics that keep one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from services.queueing.backends.sqlite.messages import stored
from services.queueing.kept import Event, Events
from services.queueing.patterns import is_pattern
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.resources import Subscription, Topic

_COLUMNS = (
    "message_id, topic, data, attributes, published, ordering_key, priority, correlation_id, retry, kind"
)
_PRUNE_EVERY = 256


class EventLog:
    """Appends, reads and forgets. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._db = database.connection
        self._catalogue = catalogue
        self._logs: dict[str, bool] = {}
        self._appended = 0
        database.on_rollback.append(self.forget)

    def forget(self) -> None:
        """Read again which topics keep a log."""
        self._logs.clear()

    def keeps(self, topic: str) -> bool:
        """Whether an existing topic keeps a log."""
        known = self._logs.get(topic)
        if known is None:
            known = self._logs[topic] = self._catalogue.topic(topic).log
        return known

    def kept_for(self, subscription: Subscription) -> bool:
        """Whether what this subscription gets is kept in a log, and there for longer than by itself."""
        if is_pattern(subscription.topic) or not self._catalogue.has_topic(subscription.topic):
            return False
        return self._catalogue.topic(subscription.topic).retains_for(subscription)

    def append(self, topic: Topic, row: tuple[Any, ...], kind: str) -> None:
        """Add a message, given as its columns."""
        self._db.execute(
            f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constant
            (*row, kind),
        )
        self._appended += 1
        if self._appended % _PRUNE_EVERY == 1:
            self.prune(topic)

    def prune(self, topic: Topic) -> None:
        """Forget what is older than the topic keeps, or more than it keeps."""
        oldest = time.time() - topic.retention_s
        # Sequence numbers rise with time, so the first young one ends the old.
        self._db.execute(
            "DELETE FROM events WHERE topic = ? AND sequence < coalesce((SELECT sequence FROM events"
            " WHERE topic = ? AND published >= ? ORDER BY sequence LIMIT 1), 9e18)",
            (topic.name, topic.name, oldest),
        )
        if topic.retention_bytes:
            self._db.execute(
                "DELETE FROM events WHERE topic = ? AND sequence <= coalesce((SELECT max(sequence) FROM"
                " (SELECT sequence, sum(length(data)) OVER (ORDER BY sequence DESC) AS total FROM events"
                " WHERE topic = ?) WHERE total > ?), -1)",
                (topic.name, topic.name, topic.retention_bytes),
            )

    def last(self, name: str) -> int:
        """The last sequence of a log; 0 without any."""
        query = "SELECT coalesce(max(sequence), 0) FROM events WHERE topic = ?"
        return int(self._db.execute(query, (name,)).fetchone()[0])

    def rows(self, name: str, events: Events, limit: int) -> list[tuple[Any, ...]]:
        """Sequence, the columns of the message and its policy, oldest first.

        Raises:
            FailedPreconditionError: The topic keeps no log.
        """
        topic = self._catalogue.topic(name)
        if not topic.log:
            raise FailedPreconditionError(
                f"topic {name!r} keeps no log", reason="TOPIC_HAS_NO_LOG", metadata={"topic": name}
            )
        oldest = max(events.after, time.time() - topic.retention_s)
        where = ["topic = ?", "sequence >= ?", "published >= ?"]
        values: list[Any] = [name, events.from_sequence, oldest]
        for column, value in (
            ("kind", events.kind),
            ("correlation_id", events.correlation_id),
            ("ordering_key", events.ordering_key),
        ):
            if value:
                # The second condition lets the partial index be used.
                where.append(f"{column} = ? AND {column} != ''")
                values.append(value)
        if events.before:
            where.append("published < ?")
            values.append(events.before)
        return self._db.execute(
            f"SELECT sequence, {_COLUMNS} FROM events"  # noqa: S608 - constants; values are bound
            f" WHERE {' AND '.join(where)} ORDER BY sequence LIMIT ?",
            (*values, limit),
        ).fetchall()


def event(row: tuple[Any, ...]) -> Event:
    """The event in a row of EventLog.rows."""
    return Event(row[0], stored(row[1:9]))
