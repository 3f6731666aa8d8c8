"""Which snapshots there are, and which streams are theirs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, select, update

from services.queueing.backends.rabbit.state import Kept
from services.queueing.backends.rabbit.store.tables import SNAPSHOTS
from services.queueing.patterns import follows
from services.queueing.resources import Snapshot
from services.runtime.errors import AlreadyExistsError, NotFoundError

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

_BEGUN_S = 600.0
"""After this, what was begun will not be finished."""


def _there(now: float) -> ColumnElement[bool]:
    return SNAPSHOTS.c.ready & (SNAPSHOTS.c.expires > now)


async def keepers(connection: AsyncConnection, topic: str) -> list[Kept]:
    """Snapshots that keep messages of a topic, those that are being made too."""
    rows = await connection.execute(select(SNAPSHOTS).where(SNAPSHOTS.c.expires > time.time()))
    return [kept for kept in map(_kept, rows) if follows(kept.snapshot.topic, topic)]


async def begin(connection: AsyncConnection, kept: Kept) -> None:
    """Insert a snapshot that nobody sees yet."""
    found = await connection.execute(select(SNAPSHOTS.c.name).where(SNAPSHOTS.c.name == kept.snapshot.name))
    if found.first() is not None:
        raise AlreadyExistsError(
            f"snapshot {kept.snapshot.name!r} exists",
            reason="SNAPSHOT_EXISTS",
            metadata={"snapshot": kept.snapshot.name},
        )
    await connection.execute(
        insert(SNAPSHOTS).values(stream=kept.stream, ready=False, **_columns(kept.snapshot))
    )


async def finish(connection: AsyncConnection, snapshot: Snapshot) -> None:
    """Let it be seen."""
    statement = update(SNAPSHOTS).where(SNAPSHOTS.c.name == snapshot.name)
    await connection.execute(statement.values(ready=True, **_columns(snapshot)))


async def get(connection: AsyncConnection, name: str) -> Kept:
    """Read a snapshot."""
    query = select(SNAPSHOTS).where(SNAPSHOTS.c.name == name, _there(time.time()))
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFoundError(f"no snapshot {name!r}", reason="SNAPSHOT_NOT_FOUND", metadata={"snapshot": name})
    return _kept(row)


async def page(connection: AsyncConnection, topic: str, limit: int, after: str) -> list[Snapshot]:
    """Read snapshots in order of names."""
    query = select(SNAPSHOTS).where(SNAPSHOTS.c.name > after, _there(time.time()))
    if topic:
        query = query.where(SNAPSHOTS.c.topic == topic)
    rows = await connection.execute(query.order_by(SNAPSHOTS.c.name).limit(limit))
    return [_kept(row).snapshot for row in rows]


async def change(connection: AsyncConnection, snapshot: Snapshot) -> Snapshot:
    """Replace labels and expiry."""
    present = (await get(connection, snapshot.name)).snapshot
    present.check_change(snapshot, time.time())
    changed = replace(snapshot, created=present.created)
    await connection.execute(
        update(SNAPSHOTS).where(SNAPSHOTS.c.name == snapshot.name).values(_columns(changed))
    )
    return changed


async def drop(connection: AsyncConnection, kept: Kept) -> None:
    """Delete a snapshot, not another one of its name."""
    of_it = (SNAPSHOTS.c.name == kept.snapshot.name) & (SNAPSHOTS.c.stream == kept.stream)
    await connection.execute(delete(SNAPSHOTS).where(of_it))


async def old(connection: AsyncConnection) -> list[Kept]:
    """Those that have expired, and those that were begun and not finished."""
    now = time.time()
    unfinished = ~SNAPSHOTS.c.ready & (SNAPSHOTS.c.created < now - _BEGUN_S)
    rows = await connection.execute(select(SNAPSHOTS).where((SNAPSHOTS.c.expires <= now) | unfinished))
    return [_kept(row) for row in rows]


def _columns(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "topic": snapshot.topic,
        "filter": snapshot.filter,
        "expires": snapshot.expires,
        "labels": json.dumps(snapshot.labels),
        "created": snapshot.created,
    }


def _kept(row: Row[Any]) -> Kept:
    labels = json.loads(row.labels)
    return Kept(Snapshot(row.name, row.topic, row.filter, row.expires, labels, row.created), row.stream)
