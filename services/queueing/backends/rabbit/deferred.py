"""Messages that RabbitMQ cannot hold until their time comes, as rows of the state's file."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from services.queueing.backends.rabbit.wire import Carried
from services.queueing.backends.sqlite.messages import STORED, retry_from, stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.resources import Subscription

NEWS = "\0deferred"
"""Touched when something was deferred, in place of a subscription's name."""
_COLUMNS = f"subscription, due, expires, attempts, history, copy, {STORED}, retry"


class Deferred:
    """Keeps and gives back. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._db = database.connection
        self._catalogue = catalogue

    def put(self, subscription: str, carried: Carried, due: float) -> None:
        """Keep a message for one subscription."""
        values = (
            *(subscription, due, carried.expires, carried.attempts),
            *(json.dumps(carried.history), carried.copy, *carried.row()),
        )
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO deferred ({_COLUMNS}) VALUES ({marks})", values)  # noqa: S608 - constant
        self._database.touched.add(NEWS)

    def put_all(self, entries: Sequence[tuple[str, Carried, float]]) -> None:
        """Keep many."""
        for entry in entries:
            self.put(*entry)

    def again(self, row: tuple[Any, ...], subscription: Subscription, due: float) -> None:
        """Keep a message, given as the columns STORED and its policy, for one subscription."""
        self.put(subscription.name, _anew(row), due)

    def forward(self, row: tuple[Any, ...], topic: str, extra: dict[str, str], due: float) -> bool:
        """Keep a message for the subscriptions of another topic; false if nobody there would get it."""
        attributes = {**json.loads(row[3]), **extra}
        takers = [s for s in self._catalogue.subscribers(topic) if s.wants(attributes)]
        moved = (row[0], topic, row[2], json.dumps(attributes), *row[4:])
        for taker in takers:
            self.put(taker.name, _anew(moved), due)
        return bool(takers)

    def due(self, limit: int) -> tuple[list[tuple[int, str, Carried]], float | None]:
        """What is due: number, subscription and message; and when the next will be."""
        rows = self._db.execute(
            f"SELECT id, {_COLUMNS} FROM deferred WHERE due <= ? ORDER BY due, id LIMIT ?",  # noqa: S608 - constant
            (time.time(), limit),
        ).fetchall()
        found = [(row[0], row[1], _carried(row[3:])) for row in rows]
        (earliest,) = self._db.execute("SELECT min(due) FROM deferred").fetchone()
        return found, earliest

    def done(self, numbers: Sequence[int]) -> None:
        """Forget messages that are with the broker now."""
        self._db.executemany("DELETE FROM deferred WHERE id = ?", [(number,) for number in numbers])

    def drop(self, subscription: str) -> None:
        """Forget what is kept for a subscription."""
        self._db.execute("DELETE FROM deferred WHERE subscription = ?", (subscription,))

    def count(self, subscription: str) -> int:
        """How many messages wait for their time."""
        query = "SELECT count(*) FROM deferred WHERE subscription = ? AND due > ?"
        return int(self._db.execute(query, (subscription, time.time())).fetchone()[0])

    def settled(self, subscription: str, message_id: str) -> bool:
        """Whether a message that the broker delivers again is here, or dead: its acknowledgement was lost."""
        for table in ("deferred", "dead_letters"):
            query = f"SELECT 1 FROM {table} WHERE subscription = ? AND message_id = ?"  # noqa: S608 - constants
            if self._db.execute(query, (subscription, message_id)).fetchone():
                return True
        return False


def _anew(row: tuple[Any, ...]) -> Carried:
    retry = retry_from(row[8])
    return Carried(stored(row[:8]), retry, copy=uuid.uuid4().hex)


def _carried(row: tuple[Any, ...]) -> Carried:
    expires, attempts, history, copy, *rest = row
    return Carried(
        stored=stored(tuple(rest[:8])),
        retry=retry_from(rest[8]),
        attempts=attempts,
        history=[(when, why) for when, why in json.loads(history)],
        expires=expires,
        copy=copy,
    )
