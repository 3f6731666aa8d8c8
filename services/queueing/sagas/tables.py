"""Tables of definitions, sagas and their histories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, PrimaryKeyConstraint, Table, Text

from services.queueing.state import Schema

if TYPE_CHECKING:
    from alembic.operations import Operations

METADATA = MetaData()
NAMES = Table(
    "saga_names",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("newest", Integer, nullable=False),
    Column("created", Double, nullable=False),
)
"""Names of definitions, with the number of the newest version: the row that changes of a definition lock."""
DEFINITIONS = Table(
    "saga_definitions",
    METADATA,
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("document", Text, nullable=False),
    PrimaryKeyConstraint("name", "version"),
)
SAGAS = Table(
    "saga_instances",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("definition", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("ended", Double, nullable=False),
    Column("due", Double),
    Column("owner", Text, nullable=False),
    Column("leased_until", Double, nullable=False),
    Column("request", Text),
    Column("digest", Text, nullable=False),
    Column("input", Text, nullable=False),
    Column("results", Text, nullable=False),
    Column("document", Text, nullable=False),
)
"""Input and results are apart from the document: listings do without them, and the input is written once."""
EVENTS = Table(
    "saga_events",
    METADATA,
    Column("saga", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("document", Text, nullable=False),
    PrimaryKeyConstraint("saga", "revision"),
)
Index("saga_instances_due", SAGAS.c.due)
Index("saga_instances_state", SAGAS.c.state, SAGAS.c.created, SAGAS.c.id)
Index("saga_instances_created", SAGAS.c.created, SAGAS.c.id)
Index("saga_instances_definition", SAGAS.c.definition, SAGAS.c.created, SAGAS.c.id)
Index("saga_instances_ended", SAGAS.c.ended)
Index("saga_instances_request", SAGAS.c.request, unique=True)


def _first(operations: Operations) -> None:
    operations.create_table(
        "saga_names",
        Column("name", Text, primary_key=True),
        Column("newest", Integer, nullable=False),
        Column("created", Double, nullable=False),
    )
    operations.create_table(
        "saga_definitions",
        Column("name", Text, nullable=False),
        Column("version", Integer, nullable=False),
        Column("document", Text, nullable=False),
        PrimaryKeyConstraint("name", "version"),
    )
    operations.create_table(
        "saga_instances",
        Column("id", Text, primary_key=True),
        Column("definition", Text, nullable=False),
        Column("version", Integer, nullable=False),
        Column("state", Text, nullable=False),
        Column("created", Double, nullable=False),
        Column("ended", Double, nullable=False),
        Column("due", Double),
        Column("owner", Text, nullable=False),
        Column("leased_until", Double, nullable=False),
        Column("request", Text),
        Column("digest", Text, nullable=False),
        Column("input", Text, nullable=False),
        Column("results", Text, nullable=False),
        Column("document", Text, nullable=False),
    )
    operations.create_table(
        "saga_events",
        Column("saga", Text, nullable=False),
        Column("revision", BigInteger, nullable=False),
        Column("document", Text, nullable=False),
        PrimaryKeyConstraint("saga", "revision"),
    )
    operations.create_index("saga_instances_due", "saga_instances", ["due"])
    operations.create_index("saga_instances_state", "saga_instances", ["state", "created", "id"])
    operations.create_index("saga_instances_created", "saga_instances", ["created", "id"])
    operations.create_index("saga_instances_definition", "saga_instances", ["definition", "created", "id"])
    operations.create_index("saga_instances_ended", "saga_instances", ["ended"])
    operations.create_index("saga_instances_request", "saga_instances", ["request"], unique=True)


SCHEMA = Schema("saga", METADATA, (_first,))
