"""Messages that were given up."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from services.queueing.backends.sqlite.batch import STORED
from services.queueing.backends.sqlite.messages import stored
from services.queueing.kept import DeadLetter, DeadLetterStats, Redrive, Where
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from services.queueing.backends.sqlite.catalogue import Catalogue
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.resources import Subscription


_PART = 200


@dataclass(frozen=True, slots=True)
class Part:
    """How far a redrive has come.

    Attributes:
        last: Id of the last dead letter that was there at the beginning: what dies again is not moved again.
        began: When, seconds since 1970.
        after: Ids up to this are done.
        done: Delivered again.
        ended: Whether there is nothing more to do.
    """

    last: int
    began: float
    after: int = 0
    done: int = 0
    ended: bool = False


class Resend(Protocol):
    """Delivers a message again that is given as the columns STORED and its policy."""

    def again(self, row: tuple[Any, ...], subscription: Subscription, due: float) -> None:
        """To one subscription."""
        ...

    def forward(self, row: tuple[Any, ...], topic: str, extra: dict[str, str], due: float) -> bool:
        """To a topic, with more attributes; false if nobody there would get it."""
        ...


class DeadLetters:
    """Buries, reads, redrives and purges. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database, catalogue: Catalogue, messages: Resend) -> None:
        self._db = database.connection
        self._catalogue = catalogue
        self._messages = messages

    def bury(
        self,
        subscription: Subscription,
        row: tuple[Any, ...],
        reason: str,
        now: float,
        attempts: int,
        history: str,
    ) -> None:
        """Give up a message: to the dead letter topic, or here if there is none or nobody hears it."""
        target = subscription.dead_letter_topic
        if target and self._catalogue.has_topic(target):
            extra = {
                "plexus-dead-letter-subscription": subscription.name,
                "plexus-dead-letter-topic": row[1],
                "plexus-dead-letter-reason": reason,
                "plexus-dead-letter-attempts": str(attempts),
            }
            if self._messages.forward(row, target, extra, now):
                return
        self._db.execute(
            f"INSERT INTO dead_letters (subscription, died, reason, history, attempts, {STORED}, retry)"  # noqa: S608 - constant
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (subscription.name, now, reason, history, attempts, *row),
        )

    def read(self, subscription: str, where: Where, limit: int, after: int) -> list[DeadLetter]:
        """Read dead letters, oldest first."""
        condition, values = _condition(subscription, where)
        rows = self._db.execute(
            f"SELECT id, died, reason, attempts, history, {STORED} FROM dead_letters"  # noqa: S608 - constants; values are bound
            f" WHERE {condition} AND id > ? ORDER BY id LIMIT ?",
            (*values, after, limit),
        )
        return [_dead_letter(row) for row in rows]

    def stats(self, subscription: str) -> DeadLetterStats:
        """Count dead letters."""
        reasons = dict(
            self._db.execute(
                "SELECT reason, count(*) FROM dead_letters WHERE subscription = ?"
                " GROUP BY reason ORDER BY count(*) DESC LIMIT 100",
                (subscription,),
            ).fetchall()
        )
        total, oldest, newest = self._db.execute(
            "SELECT count(*), min(died), max(died) FROM dead_letters WHERE subscription = ?", (subscription,)
        ).fetchone()
        return DeadLetterStats(total, reasons, oldest or 0.0, newest or 0.0)

    def last(self, name: str) -> int:
        """The id of the newest dead letter; 0 without any."""
        query = "SELECT coalesce(max(id), 0) FROM dead_letters WHERE subscription = ?"
        return int(self._db.execute(query, (name,)).fetchone()[0])

    def redrive(self, name: str, where: Where, how: Redrive, part: Part) -> Part:
        """Deliver some dead letters again; gives what is next.

        A part is a job of its own, so that others come in between.
        """
        subscription = self._catalogue.attached(name)
        if how.topic and not self._catalogue.subscribers(how.topic):
            raise FailedPreconditionError(
                f"nobody subscribes to {how.topic!r}: the messages would be lost",
                reason="TOPIC_HAS_NO_SUBSCRIBERS",
                metadata={"topic": how.topic},
            )
        condition, values = _condition(name, where)
        numbers = self._db.execute(
            f"SELECT id FROM dead_letters WHERE {condition} AND id > ? AND id <= ? ORDER BY id LIMIT ?",  # noqa: S608 - constants; values are bound
            (*values, part.after, part.last, _PART),
        ).fetchall()
        done = part.done
        for (number,) in numbers:  # one after the other: their contents may be more than fits into memory
            row = self._db.execute(
                f"SELECT {STORED}, retry FROM dead_letters WHERE id = ?",  # noqa: S608 - constant
                (number,),
            ).fetchone()
            due = part.began + (done / how.per_second if how.per_second else 0.0)
            if how.topic:
                if not self._messages.forward(row, how.topic, {}, due):
                    continue  # no subscription's filter lets it through: it stays
            else:
                self._messages.again(row, subscription, due)
            self._db.execute("DELETE FROM dead_letters WHERE id = ?", (number,))
            done += 1
        ended = len(numbers) < _PART
        return replace(part, after=part.last if ended else numbers[-1][0], done=done, ended=ended)

    def purge(self, name: str, where: Where) -> int:
        """Delete dead letters."""
        self._catalogue.subscription(name)
        condition, values = _condition(name, where)
        return self._db.execute(f"DELETE FROM dead_letters WHERE {condition}", values).rowcount  # noqa: S608 - constants; values are bound


def _condition(subscription: str, where: Where) -> tuple[str, list[Any]]:
    terms, values = ["subscription = ?"], [subscription]
    if where.ids:
        terms.append("id IN (SELECT CAST(value AS INTEGER) FROM json_each(?))")
        values.append(json.dumps([identifier for identifier in where.ids if identifier.isdecimal()]))
    for term, value in (
        ("instr(reason, ?) > 0", where.reason),
        ("topic = ?", where.topic),
        ("died >= ?", where.after),
        ("died < ?", where.before),
    ):
        if value:
            terms.append(term)
            values.append(value)  # type: ignore[arg-type]
    return " AND ".join(terms), values


def _dead_letter(row: tuple[Any, ...]) -> DeadLetter:
    identifier, died, reason, attempts, history, *message = row
    return DeadLetter(
        id=str(identifier),
        message=stored(tuple(message)),
        died=died,
        reason=reason,
        attempts=attempts,
        history=[(when, why) for when, why in json.loads(history)],
    )
