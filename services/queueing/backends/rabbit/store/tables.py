"""The tables, and the steps that lead to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from services.queueing.state import Schema

if TYPE_CHECKING:
    from alembic.operations import Operations

METADATA = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")

CATALOGUE = Table(
    "queues_catalogue",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
)
"""One row, whose version rises with every change; who changes something takes its lock first."""

TOPICS = Table(
    "queues_topics",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("created", Double, nullable=False),
    Column("settings", Text, nullable=False),
)

SUBSCRIPTIONS = Table(
    "queues_subscriptions",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("topic", Text, nullable=False, index=True),
    Column("pattern", Boolean, nullable=False),
    Column("created", Double, nullable=False),
    Column("settings", Text, nullable=False),
)

DEDUP = Table(
    "queues_dedup",
    METADATA,
    # Digests: the ids are the callers', of any characters.
    Column("key", Text, primary_key=True),
    Column("message_id", Text, nullable=False),
    Column("token", Text, nullable=False),
    # Until when its publisher may take to have it confirmed; 0 once it is.
    Column("until", Double, nullable=False),
    Column("seen", Double, nullable=False, index=True),
)

FINISHED = Table(
    "queues_finished",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("seen", Double, nullable=False, index=True),
)

SNAPSHOTS = Table(
    "queues_snapshots",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("filter", Text, nullable=False),
    Column("expires", Double, nullable=False),
    Column("labels", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("stream", Text, nullable=False),
    # Whether it is complete: it is there before, for publishers to fill it.
    Column("ready", Boolean, nullable=False),
)

DEFERRED = Table(
    "queues_deferred",
    METADATA,
    Column("id", _NUMBER, primary_key=True),
    Column("subscription", Text, nullable=False),
    Column("due", Double, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("copy", Text, nullable=False),
    Column("head", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    # Has all that counting asks for.
    Index("ix_queues_deferred_due", "due", "subscription", "id"),
    Index("ix_queues_deferred_message", "subscription", "message_id"),
    sqlite_autoincrement=True,
)

PARKED = Table(
    "queues_parked",
    METADATA,
    # As in FINISHED: a delivery is there once.
    Column("key", Text, primary_key=True),
    Column("subscription", Text, nullable=False),
    # The ordering key, in JSON, since PostgreSQL's texts have no NUL.
    Column("line", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("arrived", Integer, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("copy", Text, nullable=False),
    Column("head", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index("ix_queues_parked_line", "subscription", "line", "position"),
)
"""Messages of ordered subscriptions that would fill the window; one replica at a time writes and reads."""

DEAD_LETTERS = Table(
    "queues_dead_letters",
    METADATA,
    Column("id", _NUMBER, primary_key=True),
    Column("subscription", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("died", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("copy", Text, nullable=False),
    Column("head", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index("ix_queues_dead_letters_subscription", "subscription", "id"),
    # A message is dead once, however often its acknowledgement was lost.
    UniqueConstraint("subscription", "message_id", "copy", name="uq_queues_dead_letters_message"),
    sqlite_autoincrement=True,
)


def _first(operations: Operations) -> None:
    number = BigInteger().with_variant(Integer, "sqlite")
    operations.create_table(
        "queues_catalogue",
        Column("id", Integer, primary_key=True),
        Column("version", BigInteger, nullable=False),
    )
    operations.execute("INSERT INTO queues_catalogue (id, version) VALUES (1, 0)")
    operations.create_table(
        "queues_topics",
        Column("name", Text, primary_key=True),
        Column("created", Double, nullable=False),
        Column("settings", Text, nullable=False),
    )
    operations.create_table(
        "queues_subscriptions",
        Column("name", Text, primary_key=True),
        Column("topic", Text, nullable=False, index=True),
        Column("pattern", Boolean, nullable=False),
        Column("created", Double, nullable=False),
        Column("settings", Text, nullable=False),
    )
    operations.create_table(
        "queues_dedup",
        Column("key", Text, primary_key=True),
        Column("message_id", Text, nullable=False),
        Column("token", Text, nullable=False),
        Column("until", Double, nullable=False),
        Column("seen", Double, nullable=False, index=True),
    )
    operations.create_table(
        "queues_deferred",
        Column("id", number, primary_key=True),
        Column("subscription", Text, nullable=False),
        Column("due", Double, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("copy", Text, nullable=False),
        Column("head", Text, nullable=False),
        Column("data", LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    operations.create_index("ix_queues_deferred_due", "queues_deferred", ["due", "id"])
    operations.create_index("ix_queues_deferred_message", "queues_deferred", ["subscription", "message_id"])
    operations.create_table(
        "queues_dead_letters",
        Column("id", number, primary_key=True),
        Column("subscription", Text, nullable=False),
        Column("topic", Text, nullable=False),
        Column("died", Double, nullable=False),
        Column("reason", Text, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("copy", Text, nullable=False),
        Column("head", Text, nullable=False),
        Column("data", LargeBinary, nullable=False),
        UniqueConstraint("subscription", "message_id", "copy", name="uq_queues_dead_letters_message"),
        sqlite_autoincrement=True,
    )
    operations.create_index(
        "ix_queues_dead_letters_subscription", "queues_dead_letters", ["subscription", "id"]
    )


def _finished(operations: Operations) -> None:
    operations.create_table(
        "queues_finished",
        Column("key", Text, primary_key=True),
        Column("seen", Double, nullable=False, index=True),
    )


def _snapshots(operations: Operations) -> None:
    operations.create_table(
        "queues_snapshots",
        Column("name", Text, primary_key=True),
        Column("topic", Text, nullable=False),
        Column("filter", Text, nullable=False),
        Column("expires", Double, nullable=False),
        Column("labels", Text, nullable=False),
        Column("created", Double, nullable=False),
        Column("stream", Text, nullable=False),
        Column("ready", Boolean, nullable=False),
    )


def _parked(operations: Operations) -> None:
    operations.create_table(
        "queues_parked",
        Column("key", Text, primary_key=True),
        Column("subscription", Text, nullable=False),
        Column("line", Text, nullable=False),
        Column("position", BigInteger, nullable=False),
        Column("arrived", Integer, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("copy", Text, nullable=False),
        Column("head", Text, nullable=False),
        Column("data", LargeBinary, nullable=False),
    )
    operations.create_index("ix_queues_parked_line", "queues_parked", ["subscription", "line", "position"])


def _counting(operations: Operations) -> None:
    operations.drop_index("ix_queues_deferred_due", "queues_deferred")
    operations.create_index("ix_queues_deferred_due", "queues_deferred", ["due", "subscription", "id"])


SCHEMA = Schema("queues", METADATA, (_first, _finished, _snapshots, _parked, _counting))
