"""Sagas in SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, delete, func, select, tuple_, update

from services.queueing.sagas import catalogue, machine
from services.queueing.sagas.codec import json_text, record_of, record_text, saga_of, saga_text
from services.queueing.sagas.domain import MAX_EVENTS, State, no_saga
from services.queueing.sagas.tables import EVENTS, SAGAS, SCHEMA
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.sagas.definitions import Definition
    from services.queueing.sagas.domain import Order, Record, Saga, Which
    from services.queueing.state import Database

_LISTED = (SAGAS.c.document,)
_WHOLE = (SAGAS.c.document, SAGAS.c.input, SAGAS.c.results)
_FREE = {"owner": "", "leased_until": 0.0}
_UNENDED = tuple(state.value for state in State if not state.ended)


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

    async def start(self, order: Order, *, max_running: int) -> Saga:
        """As SagaStore."""
        async with self._writing() as connection:
            present = await self._of_request(connection, order)
            if present is not None:
                return present
            # Shared: the definition cannot be deleted before this saga is there to be seen.
            definition = await catalogue.newest(connection, order.definition, lock="share")
            await _check_room(connection, max_running)
            now = await self._database.now(connection)
            saga_id = order.id or secrets.token_hex(12)
            made = machine.begin(definition, saga_id, order.input, secrets.token_hex(6), now, order.trace)
            row = self._database.insert(SAGAS).values(
                id=saga_id,
                definition=definition.name,
                version=definition.version,
                created=now,
                owner="",
                leased_until=0.0,
                request=order.request or None,
                digest=order.digest,
                input=json_text(order.input),
                results="{}",
                **_columns(made.saga),
            )
            if not (await connection.execute(row.on_conflict_do_nothing())).rowcount:
                present = await self._of_request(connection, order)  # it came twice at once
                if present is None:
                    raise AlreadyExistsError(
                        f"saga {saga_id!r} exists", reason="SAGA_EXISTS", metadata={"saga": saga_id}
                    )
                return present
            await _write(connection, saga_id, made.records)
            return made.saga

    @staticmethod
    async def _of_request(connection: AsyncConnection, order: Order) -> Saga | None:
        if not order.request:
            return None
        query = select(SAGAS.c.digest, *_WHOLE).where(SAGAS.c.request == order.request)
        row = (await connection.execute(query)).one_or_none()
        if row is not None and row.digest != order.digest:
            raise InvalidArgumentError(
                "was used with another request", field="request_id", reason="REQUEST_ID_REUSED"
            )
        return None if row is None else saga_of(row)

    async def get(self, saga_id: str) -> Saga:
        """As SagaStore."""
        async with self._reading() as connection:
            return saga_of(await _row(connection, saga_id))

    async def work(self, saga_id: str) -> tuple[Saga, Definition]:
        """As SagaStore."""
        async with self._reading() as connection:
            saga = saga_of(await _row(connection, saga_id))
            return saga, await catalogue.version(connection, saga.definition, saga.version)

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

    async def change(self, saga_id: str, event: machine.Event) -> machine.Transition:
        """As SagaStore."""
        async with self._writing() as connection:
            row = await _row(connection, saga_id, lock=True)
            return await self._apply(connection, row, event, {})

    async def drive(self, saga_id: str, owner: str, event: machine.Event) -> tuple[machine.Transition, bool]:
        """As SagaStore."""
        async with self._writing() as connection:
            row = await _row(connection, saga_id, lock=True)
            mine = row.owner == owner
            made = await self._apply(connection, row, event, _FREE if mine else {})
            return made, mine and made.saga.due == 0.0

    async def _apply(
        self, connection: AsyncConnection, row: Any, event: machine.Event, free: dict[str, Any]
    ) -> machine.Transition:
        """Change a locked row; `free` is what else is written if nothing is to be done at once."""
        saga = saga_of(row)
        definition = await catalogue.version(connection, saga.definition, saga.version)
        made = machine.apply(definition, saga, event, await self._database.now(connection))
        changed = {} if made.saga is saga else _columns(made.saga)
        if made.saga.results != saga.results:
            changed["results"] = json_text(made.saga.results)
        if made.saga.due != 0.0:
            changed |= free
        if changed:
            await connection.execute(update(SAGAS).where(SAGAS.c.id == saga.id).values(changed))
        await _write(connection, saga.id, made.records)
        return made

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

    # Leases.

    async def claim(self, owner: str, *, limit: int, lease_s: float) -> Sequence[str]:
        """As SagaStore."""
        async with self._writing() as connection:
            now = await self._database.now(connection)
            free = (
                select(SAGAS.c.id)
                .where(SAGAS.c.due <= now, SAGAS.c.leased_until <= now)
                .order_by(SAGAS.c.due)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            taken = (
                update(SAGAS)
                .where(SAGAS.c.id.in_(free))
                .values(owner=owner, leased_until=now + lease_s)
                .returning(SAGAS.c.id)
            )
            return list((await connection.execute(taken)).scalars())

    async def renew(self, owner: str, saga_ids: Sequence[str], *, lease_s: float) -> None:
        """As SagaStore."""
        mine = and_(SAGAS.c.id.in_(saga_ids), SAGAS.c.owner == owner)
        async with self._writing() as connection:
            until = await self._database.now(connection) + lease_s
            await connection.execute(update(SAGAS).where(mine).values(leased_until=until))

    async def release(self, saga_id: str, owner: str, *, retry_s: float) -> None:
        """As SagaStore."""
        async with self._writing() as connection:
            until = await self._database.now(connection) + retry_s
            mine = and_(SAGAS.c.id == saga_id, SAGAS.c.owner == owner)
            await connection.execute(update(SAGAS).where(mine).values(owner="", leased_until=until))

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
        query = select(SAGAS.c.state, func.count()).where(SAGAS.c.state.in_(_UNENDED)).group_by(SAGAS.c.state)
        async with self._reading() as connection:
            return {State(state): count for state, count in await connection.execute(query)}

    async def purge(self, *, ended_before: float, limit: int) -> int:
        """As SagaStore."""
        old = select(SAGAS.c.id).where(SAGAS.c.ended > 0, SAGAS.c.ended < ended_before).limit(limit)
        async with self._writing() as connection:
            ids = (await connection.execute(old)).scalars().all()
            if ids:
                await connection.execute(delete(EVENTS).where(EVENTS.c.saga.in_(ids)))
                await connection.execute(delete(SAGAS).where(SAGAS.c.id.in_(ids)))
            return len(ids)


async def _row(connection: AsyncConnection, saga_id: str, *, lock: bool = False) -> Any:
    query = select(SAGAS.c.owner, *_WHOLE).where(SAGAS.c.id == saga_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise no_saga(saga_id)
    return row


async def _check_room(connection: AsyncConnection, most: int) -> None:
    some = select(SAGAS.c.id).where(SAGAS.c.state.in_(_UNENDED)).limit(most).subquery()
    if (await connection.execute(select(func.count()).select_from(some))).scalar_one() >= most:
        raise ResourceExhaustedError(
            f"{most} sagas have not ended", reason="TOO_MANY_SAGAS", metadata={"limit": str(most)}
        )


def _columns(saga: Saga) -> dict[str, Any]:
    """What changes of a row with its saga."""
    return {"state": saga.state.value, "ended": saga.ended, "due": saga.due, "document": saga_text(saga)}


async def _write(connection: AsyncConnection, saga_id: str, records: tuple[Record, ...]) -> None:
    """Add to a history, and forget the oldest beyond the bound."""
    if not records:
        return
    rows = [
        {"saga": saga_id, "revision": record.revision, "document": record_text(record)} for record in records
    ]
    await connection.execute(EVENTS.insert(), rows)
    oldest = records[-1].revision - MAX_EVENTS
    if oldest > 0:
        await connection.execute(delete(EVENTS).where(EVENTS.c.saga == saga_id, EVENTS.c.revision <= oldest))
