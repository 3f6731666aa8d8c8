"""Definitions in the database: every function works within its caller's transaction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import delete, select, update

from services.queueing.sagas.codec import definition_of, definition_text
from services.queueing.sagas.domain import MAX_VERSIONS, State, no_definition
from services.queueing.sagas.tables import DEFINITIONS, NAMES, SAGAS
from services.runtime.errors import AlreadyExistsError, FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.sagas.definitions import Definition
    from services.queueing.state import Database


async def create(
    database: Database, connection: AsyncConnection, definition: Definition, now: float
) -> Definition:
    """Keep version 1; see `SagaStore.create_definition`."""
    made = replace(definition, version=1, created=now, updated=now)
    row = database.insert(NAMES).values(name=made.name, newest=1, created=now)
    if not (await connection.execute(row.on_conflict_do_nothing())).rowcount:
        raise AlreadyExistsError(
            f"saga definition {made.name!r} exists",
            reason="SAGA_DEFINITION_EXISTS",
            metadata={"definition": made.name},
        )
    await _insert(connection, made)
    return made


async def newest(connection: AsyncConnection, name: str, *, lock: bool = False) -> Definition:
    """The newest version; with `lock` nobody else reads it to start a saga, or changes it."""
    query = select(NAMES.c.newest).where(NAMES.c.name == name)
    if lock:
        query = query.with_for_update()
    number = (await connection.execute(query)).scalar_one_or_none()
    if number is None:
        raise no_definition(name)
    return await version(connection, name, number)


async def newest_of(connection: AsyncConnection, names: Collection[str]) -> dict[str, Definition]:
    """The newest versions of those names that there are, unchanged until the transaction ends."""
    if not names:
        return {}
    query = (
        select(NAMES.c.name, DEFINITIONS.c.document)
        .join(DEFINITIONS, (NAMES.c.name == DEFINITIONS.c.name) & (NAMES.c.newest == DEFINITIONS.c.version))
        .where(NAMES.c.name.in_(names))
        .order_by(NAMES.c.name)
        .with_for_update(read=True, of=NAMES)
    )
    return {row.name: definition_of(row.document) for row in await connection.execute(query)}


async def version(connection: AsyncConnection, name: str, number: int) -> Definition:
    """One version."""
    query = select(DEFINITIONS.c.document).where(DEFINITIONS.c.name == name, DEFINITIONS.c.version == number)
    text = (await connection.execute(query)).scalar_one_or_none()
    if text is None:
        raise no_definition(name, number)
    return definition_of(text)


async def page(connection: AsyncConnection, *, limit: int, after: str) -> list[Definition]:
    """The newest versions, in order of names."""
    query = (
        select(DEFINITIONS.c.document)
        .join(NAMES, (NAMES.c.name == DEFINITIONS.c.name) & (NAMES.c.newest == DEFINITIONS.c.version))
        .where(NAMES.c.name > after)
        .order_by(NAMES.c.name)
        .limit(limit)
    )
    return [definition_of(text) for text in (await connection.execute(query)).scalars()]


async def change(connection: AsyncConnection, definition: Definition, now: float) -> Definition:
    """Keep the next version; see `SagaStore.update_definition`."""
    present = await newest(connection, definition.name, lock=True)
    if (present.steps, present.labels) == (definition.steps, definition.labels):
        return present
    made = replace(definition, version=present.version + 1, created=present.created, updated=now)
    await _insert(connection, made)
    of_name = NAMES.c.name == made.name
    await connection.execute(update(NAMES).where(of_name).values(newest=made.version))
    in_use = select(SAGAS.c.version).where(_unended(made.name))
    old = DEFINITIONS.c.version <= made.version - MAX_VERSIONS
    await connection.execute(
        delete(DEFINITIONS).where(DEFINITIONS.c.name == made.name, old, DEFINITIONS.c.version.not_in(in_use))
    )
    return made


async def remove(connection: AsyncConnection, name: str) -> None:
    """Forget all versions; see `SagaStore.delete_definition`."""
    await newest(connection, name, lock=True)
    if (await connection.execute(select(SAGAS.c.id).where(_unended(name)).limit(1))).first():
        raise FailedPreconditionError(
            f"sagas of definition {name!r} have not ended",
            reason="SAGA_DEFINITION_IN_USE",
            metadata={"definition": name},
        )
    await connection.execute(delete(DEFINITIONS).where(DEFINITIONS.c.name == name))
    await connection.execute(delete(NAMES).where(NAMES.c.name == name))


def _unended(name: str) -> ColumnElement[bool]:
    ended = [state.value for state in State if state.ended]
    return (SAGAS.c.definition == name) & SAGAS.c.state.not_in(ended)


async def _insert(connection: AsyncConnection, made: Definition) -> None:
    await connection.execute(
        DEFINITIONS.insert().values(name=made.name, version=made.version, document=definition_text(made))
    )
