"""Topics and subscriptions as rows."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from services.queueing.patterns import is_pattern
from services.queueing.resources import Backoff, RetryPolicy, Subscription, Topic
from services.runtime.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError

if TYPE_CHECKING:
    from services.queueing.backends.sqlite.database import Database

_SUBSCRIPTION = "name, topic, ack_deadline_s, backoff, minimum_s, maximum_s, max_attempts, created, settings"
_IN_COLUMNS = ("name", "topic", "ack_deadline_s", "retry", "created")


class Catalogue:
    """What exists. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database) -> None:
        self._db = database.connection
        self._known: dict[str, list[Subscription]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        database.on_rollback.append(self.forget)

    def forget(self) -> None:
        """Read again from the file what was remembered."""
        self._known.clear()
        self._subscriptions.clear()

    # Topics.

    def create_topic(self, topic: Topic) -> Topic:
        """Insert a topic."""
        created = replace(topic, created=time.time())
        inserted = self._db.execute(
            "INSERT INTO topics (name, created, settings) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (created.name, created.created, _topic_settings(created)),
        )
        if inserted.rowcount == 0:
            raise AlreadyExistsError(
                f"topic {topic.name!r} exists", reason="TOPIC_EXISTS", metadata={"topic": topic.name}
            )
        return created

    def topic(self, name: str) -> Topic:
        """Read a topic."""
        row = self._db.execute(
            "SELECT name, created, settings FROM topics WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            raise NotFoundError(f"no topic {name!r}", reason="TOPIC_NOT_FOUND", metadata={"topic": name})
        return _topic(row)

    def has_topic(self, name: str) -> bool:
        """Whether there is a topic."""
        return self._db.execute("SELECT 1 FROM topics WHERE name = ?", (name,)).fetchone() is not None

    def update_topic(self, topic: Topic) -> Topic:
        """Replace a topic's settings."""
        changed = replace(topic, created=self.topic(topic.name).created)
        self._db.execute(
            "UPDATE topics SET settings = ? WHERE name = ?", (_topic_settings(changed), topic.name)
        )
        return changed

    def topics(self, limit: int, after: str) -> list[Topic]:
        """Read topics in order of names."""
        query = "SELECT name, created, settings FROM topics WHERE name > ? ORDER BY name LIMIT ?"
        return [_topic(row) for row in self._db.execute(query, (after, limit))]

    def delete_topic(self, name: str) -> None:
        """Delete a topic, its log and what it remembers."""
        self.topic(name)
        for table, column in (("topics", "name"), ("dedup", "topic"), ("events", "topic")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))  # noqa: S608 - constants
        self._known.pop(name, None)

    # Subscriptions.

    def create_subscription(self, subscription: Subscription) -> Subscription:
        """Insert a subscription, or give the present one if it is the same."""
        if not is_pattern(subscription.topic):
            self.topic(subscription.topic)
        if subscription.dead_letter_topic:
            self.topic(subscription.dead_letter_topic)
        present = self._find(subscription.name)
        if present is not None:
            if present.settings() == subscription.settings():
                return present
            raise AlreadyExistsError(
                f"subscription {subscription.name!r} exists with other settings",
                reason="SUBSCRIPTION_EXISTS",
                metadata={"subscription": subscription.name},
            )
        created = replace(subscription.settings(), created=time.time())
        self._write(created)
        return created

    def _write(self, subscription: Subscription) -> None:
        retry = subscription.retry
        self._db.execute(
            f"INSERT OR REPLACE INTO subscriptions ({_SUBSCRIPTION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constant
            (
                *(subscription.name, subscription.topic, subscription.ack_deadline_s),
                *(retry.backoff.value, retry.minimum_s, retry.maximum_s, retry.max_attempts),
                *(subscription.created, _subscription_settings(subscription)),
            ),
        )
        self.forget()

    def _find(self, name: str) -> Subscription | None:
        known = self._subscriptions.get(name)
        if known is not None:
            return known
        row = self._db.execute(
            f"SELECT {_SUBSCRIPTION} FROM subscriptions WHERE name = ?",  # noqa: S608 - constant
            (name,),
        ).fetchone()
        if row is None:
            return None
        found = self._subscriptions[name] = _subscription(row)
        return found

    def subscription(self, name: str) -> Subscription:
        """Read a subscription."""
        found = self._find(name)
        if found is None:
            raise NotFoundError(
                f"no subscription {name!r}",
                reason="SUBSCRIPTION_NOT_FOUND",
                metadata={"subscription": name},
            )
        return found

    def attached(self, name: str) -> Subscription:
        """Read a subscription that may be pulled."""
        found = self.subscription(name)
        if found.detached:
            raise FailedPreconditionError(
                f"subscription {name!r} is detached",
                reason="SUBSCRIPTION_DETACHED",
                metadata={"subscription": name},
            )
        return found

    def update_subscription(self, subscription: Subscription) -> Subscription:
        """Replace a subscription's settings."""
        present = self.subscription(subscription.name)
        present.check_change(subscription)
        if subscription.dead_letter_topic and subscription.dead_letter_topic != present.dead_letter_topic:
            self.topic(subscription.dead_letter_topic)
        changed = replace(subscription, created=present.created)
        self._write(changed)
        return changed

    def subscriptions(self, topic: str, limit: int, after: str) -> list[Subscription]:
        """Read subscriptions in order of names."""
        rows = self._db.execute(
            f"SELECT {_SUBSCRIPTION} FROM subscriptions"  # noqa: S608 - constant
            " WHERE name > ? AND (? = '' OR topic = ?) ORDER BY name LIMIT ?",
            (after, topic, topic, limit),
        )
        return [_subscription(row) for row in rows]

    def delete_subscription(self, name: str) -> None:
        """Delete the subscription's own row."""
        self._db.execute("DELETE FROM subscriptions WHERE name = ?", (name,))
        self.forget()

    def subscribers(self, topic: str) -> list[Subscription]:
        """Subscriptions that follow an existing topic, whatever their filters."""
        known = self._known.get(topic)
        if known is None:
            self.topic(topic)
            every = self._db.execute(f"SELECT {_SUBSCRIPTION} FROM subscriptions")  # noqa: S608 - constant
            known = [s for s in map(_subscription, every) if s.follows(topic)]
            self._known[topic] = known
        return known


def _topic_settings(topic: Topic) -> str:
    settings = asdict(topic)
    return json.dumps({key: settings[key] for key in settings if key not in {"name", "created"}})


def _topic(row: tuple[Any, ...]) -> Topic:
    name, created, settings = row
    return Topic(name=name, created=created, **json.loads(settings))


def _subscription_settings(subscription: Subscription) -> str:
    settings = asdict(subscription)
    return json.dumps({key: settings[key] for key in settings if settings[key] and key not in _IN_COLUMNS})


def _subscription(row: tuple[Any, ...]) -> Subscription:
    name, topic, ack_deadline_s, backoff, minimum_s, maximum_s, max_attempts, created, settings = row
    return Subscription(
        name=name,
        topic=topic,
        ack_deadline_s=ack_deadline_s,
        retry=RetryPolicy(Backoff(backoff), minimum_s, maximum_s, max_attempts),
        created=created,
        **json.loads(settings),
    )
