"""Topics that are there from the first start: logs that everything else may write to and read."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Column, MetaData, Table, Text, select

from services.queueing.resources import Topic
from services.queueing.state import Schema
from services.runtime.errors import AlreadyExistsError, UnavailableError

if TYPE_CHECKING:
    from alembic.operations import Operations

    from services.queueing.domain import Broker
    from services.queueing.state import Database

log = structlog.get_logger(__name__)

NAMES = ("workflow-events", "error-events", "audit-events")
_RETRY_S = 1.0

_METADATA = MetaData()
_MADE = Table("topics_made", _METADATA, Column("name", Text, primary_key=True))


def _create(operations: Operations) -> None:
    operations.create_table("topics_made", Column("name", Text, primary_key=True))


SCHEMA = Schema(room="topics", metadata=_METADATA, steps=(_create,))


async def make_default_topics(broker: Broker, database: Database, *, retention_s: float) -> None:
    """Make each of them once in the life of the state: what somebody changed or deleted stays so.

    Waits for a broker that is away.

    Args:
        broker: Where they are made.
        database: Remembers that they were.
        retention_s: How long their logs keep an event.
    """
    while True:
        try:
            await database.migrate(SCHEMA)
            for name in NAMES:
                await _make(broker, database, Topic(name, log=True, retention_s=retention_s))
        except UnavailableError as error:
            log.warning("default_topics_wait", reason=error.reason)
            await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
        else:
            return


async def _make(broker: Broker, database: Database, topic: Topic) -> None:
    async with database.reading() as connection:
        made = await connection.execute(select(_MADE.c.name).where(_MADE.c.name == topic.name))
        if made.first() is not None:
            return
    with suppress(AlreadyExistsError):  # by another replica at this moment, or by a user
        await broker.create_topic(topic)
        log.info("default_topic_made", topic=topic.name)
    async with database.transaction() as connection:
        await connection.execute(database.insert(_MADE).values(name=topic.name).on_conflict_do_nothing())
