"""Tables of a room, and the numbered steps that lead to them.

The steps are a list under a lock rather than Alembic's environment: each room (queues, schedules, sagas)
counts its own, so that two rooms never have to agree on one chain of revisions; there is no folder of scripts
to find in a wheel; and replicas that start together need the lock in any case. Alembic's operations write the
DDL for both databases, and its comparison shows in tests that the steps lead to the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import Column, Integer, MetaData, Table, Text, func, insert, select, text, update

from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.operations import Operations
    from sqlalchemy import Connection

Step: TypeAlias = "Callable[[Operations], None]"

_VERSIONS = Table(
    "schema_versions",
    MetaData(),
    Column("room", Text, primary_key=True),
    Column("version", Integer, nullable=False),
)
_LOCK = 0x706C65787573
"""Of all migrations, among PostgreSQL's advisory locks: "plexus"."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one room.

    Attributes:
        room: Whose they are; names of tables begin with it.
        metadata: The tables as they are after the last step.
        steps: Oldest first; never changed once released, only added to. Replicas of the version before go on
            beside a newer one, so a step adds and does not take away what that version uses.
    """

    room: str
    metadata: MetaData
    steps: tuple[Step, ...]


def migrate(connection: Connection, schema: Schema) -> int:
    """Bring a room's tables up to date, in the connection's transaction; how many steps that took.

    Of replicas that come at once, one does it and the others wait for its end.

    Raises:
        FailedPreconditionError: The tables were made by a newer version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    _VERSIONS.create(connection, checkfirst=True)
    seen = connection.execute(select(_VERSIONS.c.version).where(_VERSIONS.c.room == schema.room)).scalar()
    if seen is None:
        connection.execute(insert(_VERSIONS).values(room=schema.room, version=0))
    done = seen or 0
    if done > len(schema.steps):
        raise FailedPreconditionError(
            f"a newer version of Plexus made the tables of {schema.room!r}: update, or restore a backup",
            reason="STATE_TOO_NEW",
        )
    if done < len(schema.steps):
        # Large, and most starts find nothing to do.
        from alembic.migration import MigrationContext  # noqa: PLC0415
        from alembic.operations import Operations  # noqa: PLC0415

        operations = Operations(MigrationContext.configure(connection))
        for step in schema.steps[done:]:
            step(operations)
        connection.execute(
            update(_VERSIONS).where(_VERSIONS.c.room == schema.room).values(version=len(schema.steps))
        )
    return len(schema.steps) - done
