"""The tables of schedules: times are microseconds since 1970."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, MetaData, Table, Text

from plexus.queueing.v1 import schedules_pb2
from services.queueing.schedules.convert import definition_from, definition_to
from services.queueing.schedules.domain import Definition, Run, RunState, Schedule, instant, microseconds
from services.queueing.state import Schema

if TYPE_CHECKING:
    from datetime import datetime

    from alembic.operations import Operations

METADATA = MetaData()
SCHEDULES = Table(
    "schedules",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("uid", Text, nullable=False, unique=True),
    Column("topic", Text, nullable=False),
    Column("definition", LargeBinary, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
    Column("decided", BigInteger, nullable=False),
    Column("next_due", BigInteger),
    Column("next_fire", BigInteger),
    Column("last_fired", BigInteger),
    Column("last_error", Text, nullable=False),
    Column("firings", BigInteger, nullable=False),
    Column("missed", BigInteger, nullable=False),
    Column("runs", BigInteger, nullable=False),
    Index("schedules_next_fire", "next_fire"),
    Index("schedules_topic", "topic", "name"),
    Index("schedules_decided", "decided"),
)
RUNS = Table(
    "schedules_runs",
    METADATA,
    Column("uid", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("due", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("manual", Boolean, nullable=False),
    Column("ended", BigInteger),
    Column("message_id", Text, nullable=False),
    Column("error", Text, nullable=False),
    # While it is being published: by whom and until when, and what, if the schedule says something else now.
    Column("owner", Text, nullable=False),
    Column("lease", BigInteger),
    Column("definition", LargeBinary),
    Index("schedules_runs_lease", "lease"),
)


def _first(operations: Operations) -> None:
    operations.create_table(
        "schedules",
        Column("name", Text, primary_key=True),
        Column("uid", Text, nullable=False, unique=True),
        Column("topic", Text, nullable=False),
        Column("definition", LargeBinary, nullable=False),
        Column("paused", Boolean, nullable=False),
        Column("revision", Integer, nullable=False),
        *(Column(name, BigInteger, nullable=False) for name in ("created", "updated", "decided")),
        *(Column(name, BigInteger) for name in ("next_due", "next_fire", "last_fired")),
        Column("last_error", Text, nullable=False),
        *(Column(name, BigInteger, nullable=False) for name in ("firings", "missed", "runs")),
    )
    operations.create_index("schedules_next_fire", "schedules", ["next_fire"])
    operations.create_index("schedules_topic", "schedules", ["topic", "name"])
    operations.create_index("schedules_decided", "schedules", ["decided"])
    operations.create_table(
        "schedules_runs",
        Column("uid", Text, primary_key=True),
        Column("number", BigInteger, primary_key=True, autoincrement=False),
        Column("due", BigInteger, nullable=False),
        Column("state", Text, nullable=False),
        Column("revision", Integer, nullable=False),
        Column("manual", Boolean, nullable=False),
        Column("ended", BigInteger),
        *(Column(name, Text, nullable=False) for name in ("message_id", "error", "owner")),
        Column("lease", BigInteger),
        Column("definition", LargeBinary),
    )
    operations.create_index("schedules_runs_lease", "schedules_runs", ["lease"])


SCHEMA = Schema("schedules", METADATA, (_first,))


def maybe(value: datetime | None) -> int | None:
    """A column of a time that may be absent."""
    return None if value is None else microseconds(value)


def _instant(value: int | None) -> datetime | None:
    return None if value is None else instant(value)


def encoded(definition: Definition) -> bytes:
    """The column of a definition."""
    return definition_to(definition).SerializeToString(deterministic=True)


def decoded(column: bytes, created: int) -> Definition:
    """The inverse of `encoded`."""
    return definition_from(schedules_pb2.Schedule.FromString(column), instant(created))


def progress(schedule: Schedule) -> dict[str, Any]:
    """The columns that its runs change."""
    return {
        "next_due": maybe(schedule.next_due),
        "next_fire": maybe(schedule.next_fire),
        "firings": schedule.firings,
        "missed": schedule.missed,
        "runs": schedule.runs,
    }


def columns(schedule: Schedule) -> dict[str, Any]:
    """All columns of a schedule."""
    return {
        "name": schedule.name,
        "uid": schedule.uid,
        "topic": schedule.definition.topic,
        "definition": encoded(schedule.definition),
        "paused": schedule.paused,
        "revision": schedule.revision,
        "created": microseconds(schedule.created),
        "updated": microseconds(schedule.updated),
        "decided": microseconds(schedule.updated),
        "last_fired": maybe(schedule.last_fired),
        "last_error": schedule.last_error,
        **progress(schedule),
    }


def schedule_of(row: Any) -> Schedule:
    """The schedule in a row."""
    return Schedule(
        name=row.name,
        uid=row.uid,
        definition=decoded(bytes(row.definition), row.created),
        created=instant(row.created),
        updated=instant(row.updated),
        paused=row.paused,
        revision=row.revision,
        next_due=_instant(row.next_due),
        last_fired=_instant(row.last_fired),
        last_error=row.last_error,
        firings=row.firings,
        missed=row.missed,
        runs=row.runs,
    )


def run_columns(uid: str, run: Run, owner: str, lease: datetime) -> dict[str, Any]:
    """All columns of a new run."""
    pending = run.state is RunState.PENDING
    return {
        "uid": uid,
        "number": run.number,
        "due": microseconds(run.due),
        "state": run.state.value,
        "revision": run.revision,
        "manual": run.manual,
        "ended": maybe(run.ended),
        "message_id": run.message_id,
        "error": run.error,
        "owner": owner if pending else "",
        "lease": microseconds(lease) if pending else None,
        "definition": None,
    }


def run_of(row: Any) -> Run:
    """The run in a row."""
    return Run(
        number=row.number,
        due=instant(row.due),
        state=RunState(row.state),
        revision=row.revision,
        manual=row.manual,
        ended=_instant(row.ended),
        message_id=row.message_id,
        error=row.error,
    )
