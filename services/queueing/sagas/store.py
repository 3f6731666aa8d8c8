"""Sagas in SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, delete, func, select, tuple_, update

from services.queueing.sagas import catalogue, writing
from services.queueing.sagas.codec import record_of, saga_of
from services.queueing.sagas.contract import Change, Order
from services.queueing.sagas.domain import State, no_saga
from services.queueing.sagas.tables import EVENTS, SAGAS, SCHEMA
from services.queueing.sagas.writing import UNENDED, WHOLE
from services.runtime.errors import PlexusError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.sagas.contract import Lease, Made, Which
    from services.queueing.sagas.definitions import Definition
    from services.queueing.sagas.domain import Record, Saga
    from services.queueing.state import Database

_LISTED = (SAGAS.c.document,)


class DatabaseSagaStore:
    """A SagaStore; its tables are made, or brought up to date, at first use."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._migrating = asyncio.Lock()
        self._migrated = False

    async def _migrate(self) -> None:
        if self._migrated:
            return
        async with self._migrating:
            if not self._migrated:
                await self._database.migrate(SCHEMA)
                self._migrated = True

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        await self._migrate()
        async with self._database.transaction() as connection:
            yield connection

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        await self._migrate()
        async with self._database.reading() as connection:
            yield connection

    # Definitions.

    async def create_definition(self, definition: Definition) -> Definition:
        """As SagaStore."""
        async with self._writing() as connection:
            now = await self._database.now(connection)
            return await catalogue.create(self._database, connection, definition, now)

    async def get_definition(self, name: str, version: int = 0) -> Definition:
        """As SagaStore."""
        async with self._reading() as connection:
            if version:
                return await catalogue.version(connection, name, version)
            return await catalogue.newest(connection, name)

    async def list_definitions(self, *, limit: int, after: str = "") -> list[Definition]:
        """As SagaStore."""
        async with self._reading() as connection:
            return await catalogue.page(connection, limit=limit, after=after)

    async def update_definition(self, definition: Definition) -> Definition:
        """As SagaStore."""
        async with self._writing() as connection:
            now = await self._database.now(connection)
            return await catalogue.change(connection, definition, now)

    async def delete_definition(self, name: str) -> None:
        """As SagaStore."""
        async with self._writing() as connection:
            await catalogue.remove(connection, name)

    # Sagas.

    async def write(
        self, jobs: Sequence[Order | Change], lease: Lease | None = None
    ) -> list[Made | PlexusError]:
        """As SagaStore."""
        results: list[Made | PlexusError] = []
        for part in _without_twins(jobs):
            try:
                results += await self._write(part, lease)
            except (UnavailableError, ResourceExhaustedError):  # for all of them
                raise
            except Exception as error:
                if len(part) > 1:  # it is the fault of one, and none was done: each by itself
                    for job in part:
                        results += await self.write([job], lease)
                elif isinstance(error, PlexusError):
                    results.append(error)
                else:
                    raise
        return results

    async def _write(self, jobs: Sequence[Order | Change], lease: Lease | None) -> list[Made | PlexusError]:
        orders = [job for job in jobs if isinstance(job, Order)]
        changes = [job for job in jobs if isinstance(job, Change)]
        done: list[Made | PlexusError] = []
        changed: list[Made | PlexusError] = []
        async with self._writing() as connection:
            room = writing.Room(lease, await self._database.now(connection))
            if changes:
                changed = await writing.changed(connection, changes, room)
            if orders:
                done = await writing.started(self._database, connection, orders, room)
        starts, others = iter(done), iter(changed)
        return [next(starts if isinstance(job, Order) else others) for job in jobs]

    async def get(self, saga_id: str) -> Saga:
        """As SagaStore."""
        async with self._reading() as connection:
            return saga_of(await _row(connection, saga_id))

    async def list_sagas(
        self, which: Which, *, limit: int, before: tuple[float, str] | None = None
    ) -> list[Saga]:
        """As SagaStore."""
        wanted: list[ColumnElement[bool]] = []
        if which.definition:
            wanted.append(SAGAS.c.definition == which.definition)
        if which.state is not None:
            wanted.append(SAGAS.c.state == which.state.value)
        if before is not None:
            wanted.append(tuple_(SAGAS.c.created, SAGAS.c.id) < before)
        query = select(*_LISTED).order_by(SAGAS.c.created.desc(), SAGAS.c.id.desc()).limit(limit)
        async with self._reading() as connection:
            return [saga_of(row) for row in await connection.execute(query.where(*wanted))]

    async def events(self, saga_id: str, *, limit: int, after: int = 0) -> list[Record]:
        """As SagaStore."""
        query = (
            select(EVENTS.c.document)
            .where(EVENTS.c.saga == saga_id, EVENTS.c.revision > after)
            .order_by(EVENTS.c.revision)
            .limit(limit)
        )
        async with self._reading() as connection:
            found = [record_of(text) for text in (await connection.execute(query)).scalars()]
            if not found:
                await _row(connection, saga_id)
            return found

    async def revisions(self, saga_ids: Sequence[str]) -> dict[str, int]:
        """As SagaStore."""
        query = (
            select(EVENTS.c.saga, func.max(EVENTS.c.revision))
            .where(EVENTS.c.saga.in_(saga_ids))
            .group_by(EVENTS.c.saga)
        )
        async with self._reading() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    # Leases.

    async def claim(self, lease: Lease) -> list[Made]:
        """As SagaStore."""
        async with self._writing() as connection:
            room = writing.Room(lease, await self._database.now(connection))
            free = (
                select(SAGAS.c.id)
                .where(SAGAS.c.due <= room.now, SAGAS.c.leased_until <= room.now)
                .order_by(SAGAS.c.due)
                .limit(lease.room)
                .with_for_update(skip_locked=True)
            )
            ids = (await connection.execute(free)).scalars().all()
            return await writing.claimed(connection, ids, room) if ids else []

    async def renew(self, owner: str, saga_ids: Sequence[str], *, lease_s: float) -> None:
        """As SagaStore."""
        await self._lease(saga_ids, owner, lease_s, owner)

    async def release(self, saga_ids: Sequence[str], owner: str, *, retry_s: float) -> None:
        """As SagaStore."""
        await self._lease(saga_ids, owner, retry_s, "")

    async def _lease(self, saga_ids: Sequence[str], owner: str, seconds: float, to: str) -> None:
        """Say who has sagas, and for how long, as far as one still has them."""
        mine = (
            select(SAGAS.c.id)
            .where(SAGAS.c.id.in_(saga_ids), SAGAS.c.owner == owner)
            .order_by(SAGAS.c.id)
            .with_for_update()
        )
        async with self._writing() as connection:
            until = await self._database.now(connection) + seconds
            await connection.execute(
                update(SAGAS).where(SAGAS.c.id.in_(mine)).values(owner=to, leased_until=until)
            )

    async def release_all(self, owner: str) -> None:
        """As SagaStore."""
        mine = (
            select(SAGAS.c.id)
            .where(SAGAS.c.due == 0.0, SAGAS.c.owner == owner)
            .order_by(SAGAS.c.id)
            .with_for_update()
        )
        async with self._writing() as connection:
            await connection.execute(
                update(SAGAS).where(SAGAS.c.id.in_(mine)).values(owner="", leased_until=0.0)
            )

    async def next_due_s(self, *, most: float) -> float:
        """As SagaStore."""
        async with self._reading() as connection:
            now = await self._database.now(connection)
            query = select(SAGAS.c.due, SAGAS.c.leased_until).where(SAGAS.c.due < now + most)
            ready = (
                await connection.execute(
                    query.where(SAGAS.c.leased_until <= now).order_by(SAGAS.c.due).limit(1)
                )
            ).first()
            leased = (
                await connection.execute(
                    query.where(SAGAS.c.leased_until > now).order_by(SAGAS.c.leased_until).limit(1)
                )
            ).first()
        times: list[float] = [max(row.due, row.leased_until) for row in (ready, leased) if row is not None]
        return min([most, *(max(0.0, at - now) for at in times)])

    # Housekeeping.

    async def counts(self) -> dict[State, int]:
        """As SagaStore."""
        query = select(SAGAS.c.state, func.count()).where(SAGAS.c.state.in_(UNENDED)).group_by(SAGAS.c.state)
        async with self._reading() as connection:
            return {State(state): count for state, count in await connection.execute(query)}

    async def purge(self, *, ended_before: float, limit: int) -> int:
        """As SagaStore."""
        old = select(SAGAS.c.id).where(SAGAS.c.ended > 0, SAGAS.c.ended < ended_before).limit(limit)
        old = old.with_for_update(skip_locked=True)
        async with self._writing() as connection:
            ids = (await connection.execute(old)).scalars().all()
            if ids:
                await connection.execute(delete(EVENTS).where(EVENTS.c.saga.in_(ids)))
                await connection.execute(delete(SAGAS).where(SAGAS.c.id.in_(ids)))
            return len(ids)


async def _row(connection: AsyncConnection, saga_id: str) -> Any:
    row = (await connection.execute(select(*WHOLE).where(SAGAS.c.id == saga_id))).one_or_none()
    if row is None:
        raise no_saga(saga_id)
    return row


def _without_twins(jobs: Sequence[Order | Change]) -> Iterator[list[Order | Change]]:
    """The jobs in parts, in none of which two orders want the same id or are the same request."""
    part: list[Order | Change] = []
    seen: set[tuple[str, str]] = set()
    for job in jobs:
        names = set()
        if isinstance(job, Order):
            names = {name for name in (("id", job.id), ("request", job.request)) if name[1]}
        if names & seen:
            yield part
            part, seen = [], set()
        seen |= names
        part.append(job)
    if part:
        yield part
