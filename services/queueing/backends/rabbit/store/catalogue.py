"""Topics and subscriptions: as rows, and as remembered from them until somebody changes them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import delete, select, update

from services.queueing.backends.rabbit.state import Route
from services.queueing.backends.rabbit.store import snapshots
from services.queueing.backends.rabbit.store.tables import CATALOGUE, SUBSCRIPTIONS, TOPICS
from services.queueing.patterns import is_pattern
from services.queueing.resources import Backoff, RetryPolicy, Subscription, Topic
from services.runtime.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.state import Database

Result = TypeVar("Result")


class Catalogue:
    """What exists. Methods with a connection are parts of their caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._routes: dict[str, Route] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._version = -1
        self._memory = 0
        """Rises with each forgetting, so that what was read before is not remembered after."""
        self._checking = asyncio.Lock()
        self._checked = 0.0

    # Memory.

    def forget(self) -> None:
        """Read again what was remembered."""
        self._memory += 1
        self._routes.clear()
        self._subscriptions.clear()

    async def fresh(self) -> None:
        """Forget what others have changed before this call; callers at the same time share one question."""
        if not self._database.shared:
            return
        asked = time.monotonic()
        async with self._checking:
            if self._checked >= asked:
                return
            began = time.monotonic()
            async with self._database.reading() as connection:
                version = (await connection.execute(select(CATALOGUE.c.version))).scalar_one()
            self._checked = began
            if version != self._version:
                self._version = version
                self.forget()

    async def route(self, topic: str) -> Route:
        """Where messages of a topic go."""
        known = self._routes.get(topic)
        if known is None:
            memory = self._memory
            async with self._database.reading() as connection:
                known = Route(
                    await self.read_topic(connection, topic),
                    await subscribers(connection, topic),
                    await snapshots.keepers(connection, topic),
                )
            if memory == self._memory:
                self._routes[topic] = known
        return known

    async def subscription(self, name: str) -> Subscription:
        """Read a subscription."""
        known = self._subscriptions.get(name)
        if known is None:
            memory = self._memory
            async with self._database.reading() as connection:
                known = await self.read_subscription(connection, name)
            if memory == self._memory:
                self._subscriptions[name] = known
        return known

    # Rows.

    @staticmethod
    async def read_topic(connection: AsyncConnection, name: str) -> Topic:
        """Read a topic."""
        row = (await connection.execute(select(TOPICS).where(TOPICS.c.name == name))).one_or_none()
        if row is None:
            raise NotFoundError(f"no topic {name!r}", reason="TOPIC_NOT_FOUND", metadata={"topic": name})
        return _topic(row)

    @staticmethod
    async def read_subscription(connection: AsyncConnection, name: str) -> Subscription:
        """Read a subscription."""
        query = select(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.name == name)
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(
                f"no subscription {name!r}",
                reason="SUBSCRIPTION_NOT_FOUND",
                metadata={"subscription": name},
            )
        return _subscription(row)

    async def topics(self, limit: int, after: str) -> list[Topic]:
        """Read topics in order of names."""
        query = select(TOPICS).where(TOPICS.c.name > after).order_by(TOPICS.c.name).limit(limit)
        async with self._database.reading() as connection:
            return [_topic(row) for row in await connection.execute(query)]

    async def subscriptions(self, topic: str, limit: int, after: str) -> list[Subscription]:
        """Read subscriptions in order of names."""
        query = select(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.name > after)
        if topic:
            query = query.where(SUBSCRIPTIONS.c.topic == topic)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(SUBSCRIPTIONS.c.name).limit(limit))
            return [_subscription(row) for row in rows]

    # Changes.

    async def change(self, job: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        """Do it in a transaction that is alone with the catalogue."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute(update(CATALOGUE).values(version=CATALOGUE.c.version + 1))
                return await job(connection)
        finally:
            self.forget()

    async def create_topic(self, topic: Topic) -> Topic:
        """Insert a topic."""
        created = replace(topic, created=time.time())

        async def job(connection: AsyncConnection) -> Topic:
            statement = self._database.insert(TOPICS).values(
                name=created.name, created=created.created, settings=_topic_settings(created)
            )
            inserted = await connection.execute(statement.on_conflict_do_nothing())
            if inserted.rowcount == 0:
                raise AlreadyExistsError(
                    f"topic {topic.name!r} exists", reason="TOPIC_EXISTS", metadata={"topic": topic.name}
                )
            return created

        return await self.change(job)

    async def update_topic(self, topic: Topic) -> Topic:
        """Replace a topic's settings."""

        async def job(connection: AsyncConnection) -> Topic:
            changed = replace(topic, created=(await self.read_topic(connection, topic.name)).created)
            await connection.execute(
                update(TOPICS).where(TOPICS.c.name == topic.name).values(settings=_topic_settings(changed))
            )
            return changed

        return await self.change(job)

    async def delete_topic(self, name: str) -> None:
        """Delete a topic."""

        async def job(connection: AsyncConnection) -> None:
            await self.read_topic(connection, name)
            await connection.execute(delete(TOPICS).where(TOPICS.c.name == name))

        await self.change(job)

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """Insert a subscription, or give the present one if it is the same."""

        async def job(connection: AsyncConnection) -> Subscription:
            if not is_pattern(subscription.topic):
                await self.read_topic(connection, subscription.topic)
            if subscription.dead_letter_topic:
                await self.read_topic(connection, subscription.dead_letter_topic)
            created = replace(subscription.settings(), created=time.time())
            statement = self._database.insert(SUBSCRIPTIONS).values(_columns(created))
            inserted = await connection.execute(statement.on_conflict_do_nothing())
            if inserted.rowcount:
                return created
            present = await self.read_subscription(connection, subscription.name)
            if present.settings() != subscription.settings():
                raise AlreadyExistsError(
                    f"subscription {subscription.name!r} exists with other settings",
                    reason="SUBSCRIPTION_EXISTS",
                    metadata={"subscription": subscription.name},
                )
            return present

        return await self.change(job)

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """Replace a subscription's settings."""

        async def job(connection: AsyncConnection) -> Subscription:
            present = await self.read_subscription(connection, subscription.name)
            present.check_change(subscription)
            if subscription.dead_letter_topic not in {"", present.dead_letter_topic}:
                await self.read_topic(connection, subscription.dead_letter_topic)
            changed = replace(subscription, created=present.created, sought=present.sought)
            await self._write(connection, changed)
            return changed

        return await self.change(job)

    @staticmethod
    async def _write(connection: AsyncConnection, subscription: Subscription) -> None:
        rows = update(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.name == subscription.name)
        await connection.execute(rows.values(_columns(subscription)))

    async def pass_over(
        self,
        name: str,
        published_before: float,
        also: Callable[[AsyncConnection, Subscription], Awaitable[None]],
    ) -> Subscription:
        """Note what Seek passes over and, in the same transaction, do what follows from it."""

        async def job(connection: AsyncConnection) -> Subscription:
            present = attached(await self.read_subscription(connection, name))
            changed = present.passing_over(published_before, time.time())
            await self._write(connection, changed)
            await also(connection, changed)
            return changed

        return await self.change(job)

    async def delete_subscription(
        self, name: str, also: Callable[[AsyncConnection], Awaitable[None]]
    ) -> None:
        """Delete a subscription and, in the same transaction, what else is of it."""

        async def job(connection: AsyncConnection) -> None:
            await self.read_subscription(connection, name)
            await also(connection)
            await connection.execute(delete(SUBSCRIPTIONS).where(SUBSCRIPTIONS.c.name == name))

        await self.change(job)


async def subscribers(connection: AsyncConnection, topic: str) -> Sequence[Subscription]:
    """Subscriptions that follow a topic, whatever their filters."""
    query = select(SUBSCRIPTIONS).where((SUBSCRIPTIONS.c.topic == topic) | SUBSCRIPTIONS.c.pattern)
    rows = await connection.execute(query.order_by(SUBSCRIPTIONS.c.name))
    return [found for found in map(_subscription, rows) if found.follows(topic)]


def attached(subscription: Subscription) -> Subscription:
    """The subscription, if it may be pulled.

    Raises:
        FailedPreconditionError: It is detached.
    """
    if subscription.detached:
        raise FailedPreconditionError(
            f"subscription {subscription.name!r} is detached",
            reason="SUBSCRIPTION_DETACHED",
            metadata={"subscription": subscription.name},
        )
    return subscription


def _settings(resource: Topic | Subscription, apart: set[str]) -> str:
    settings = asdict(resource)
    # What is not set is not written: so a replica of the version before reads what does not use a new field.
    return json.dumps({key: settings[key] for key in settings if settings[key] and key not in apart})


def _topic_settings(topic: Topic) -> str:
    return _settings(topic, {"name", "created"})


def _topic(row: Row[Any]) -> Topic:
    return Topic(name=row.name, created=row.created, **json.loads(row.settings))


def _columns(subscription: Subscription) -> dict[str, Any]:
    return {
        "name": subscription.name,
        "topic": subscription.topic,
        "pattern": is_pattern(subscription.topic),
        "created": subscription.created,
        "settings": _settings(subscription, {"name", "topic", "created"}),
    }


def _subscription(row: Row[Any]) -> Subscription:
    settings = json.loads(row.settings)
    retry = settings.pop("retry")
    policy = RetryPolicy(**{**retry, "backoff": Backoff(retry["backoff"])})
    sought = tuple((before, at) for before, at in settings.pop("sought", ()))
    return Subscription(
        name=row.name, topic=row.topic, created=row.created, retry=policy, sought=sought, **settings
    )
