"""Schedules as people see them: made, read, changed, deleted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select, update

from services.queueing.schedules.domain import RunState, Schedule, State
from services.queueing.schedules.tables import (
    RUNS,
    SCHEDULES,
    SCHEMA,
    columns,
    encoded,
    run_of,
    schedule_of,
)
from services.runtime.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.schedules.domain import Run
    from services.queueing.state import Database


def missing(name: str) -> NotFoundError:
    """The one error for a schedule that is not there."""
    return NotFoundError(
        f"no schedule {name!r}", reason="SCHEDULE_NOT_FOUND", metadata={"schedule": name[:128]}
    )


async def locked(connection: AsyncConnection, name: str) -> Schedule:
    """A schedule that nobody else changes until the transaction ends.

    Raises:
        NotFoundError: There is none.
    """
    query = select(SCHEDULES).where(SCHEDULES.c.name == name).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise missing(name)
    return schedule_of(row)


class ScheduleStore:
    """Schedules in the state's database; every change is durable when its call returns.

    All calls raise UnavailableError while the database cannot be reached.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def migrate(self) -> None:
        """Bring the tables up to date; to be awaited before they are used."""
        await self._database.migrate(SCHEMA)

    async def create(self, schedule: Schedule, *, most: int) -> None:
        """Keep a new schedule.

        Args:
            schedule: What to keep.
            most: How many there may be.

        Raises:
            AlreadyExistsError: There is one of this name.
            ResourceExhaustedError: There are as many as there may be.
        """
        async with self._database.transaction() as connection:
            count = (await connection.execute(select(func.count()).select_from(SCHEDULES))).scalar_one()
            if count >= most:
                raise ResourceExhaustedError(
                    f"there are {count} schedules: delete some, or raise queueing.max_schedules",
                    reason="TOO_MANY_SCHEDULES",
                )
            insert = self._database.insert(SCHEDULES).values(columns(schedule))
            done = await connection.execute(insert.on_conflict_do_nothing().returning(SCHEDULES.c.name))
            if done.scalar_one_or_none() is None:
                raise AlreadyExistsError(
                    f"schedule {schedule.name!r} exists",
                    reason="SCHEDULE_EXISTS",
                    metadata={"schedule": schedule.name},
                )

    async def get(self, name: str) -> Schedule:
        """A schedule.

        Raises:
            NotFoundError: There is none.
        """
        async with self._database.reading() as connection:
            row = (await connection.execute(select(SCHEDULES).where(SCHEDULES.c.name == name))).one_or_none()
        if row is None:
            raise missing(name)
        return schedule_of(row)

    async def schedules(
        self, *, topic: str = "", state: State | None = None, limit: int, after: str = ""
    ) -> list[Schedule]:
        """Schedules in order of names, of one topic and in one state if given."""
        query = select(SCHEDULES).where(SCHEDULES.c.name > after).order_by(SCHEDULES.c.name).limit(limit)
        if topic:
            query = query.where(SCHEDULES.c.topic == topic)
        if state is not None:
            query = query.where(SCHEDULES.c.paused == (state is State.PAUSED))
        if state is State.ACTIVE:
            query = query.where(SCHEDULES.c.next_due.is_not(None))
        elif state is State.COMPLETED:
            query = query.where(SCHEDULES.c.next_due.is_(None))
        async with self._database.reading() as connection:
            return [schedule_of(row) for row in await connection.execute(query)]

    async def change(self, name: str, edit: Callable[[Schedule], Schedule]) -> Schedule:
        """Change a schedule; what is being published stays what it was.

        Args:
            name: Of the schedule.
            edit: What becomes of it; what it raises leaves everything as it was.

        Returns:
            The schedule as changed, or as it was if the edit changed nothing.

        Raises:
            NotFoundError: There is none.
        """
        async with self._database.transaction() as connection:
            before = await locked(connection, name)
            edited = edit(before)
            if edited == before:
                return before
            after = replace(edited, revision=before.revision + 1)
            if after.definition != before.definition:
                await connection.execute(
                    update(RUNS)
                    .where(
                        RUNS.c.uid == before.uid,
                        RUNS.c.state == RunState.PENDING,
                        RUNS.c.definition.is_(None),
                    )
                    .values(definition=encoded(before.definition))
                )
            await connection.execute(
                update(SCHEDULES).where(SCHEDULES.c.uid == before.uid).values(columns(after))
            )
            return after

    async def delete(self, name: str) -> None:
        """Delete a schedule with its history.

        Raises:
            NotFoundError: There is none.
        """
        async with self._database.transaction() as connection:
            found = await locked(connection, name)
            await connection.execute(delete(RUNS).where(RUNS.c.uid == found.uid))
            await connection.execute(delete(SCHEDULES).where(SCHEDULES.c.uid == found.uid))

    async def runs(self, name: str, *, limit: int, before: int = 0) -> list[Run]:
        """What a schedule did, newest first, before a number if given.

        Raises:
            NotFoundError: There is no such schedule.
        """
        found = await self.get(name)
        query = select(RUNS).where(RUNS.c.uid == found.uid).order_by(RUNS.c.number.desc()).limit(limit)
        if before:
            query = query.where(RUNS.c.number < before)
        async with self._database.reading() as connection:
            return [run_of(row) for row in await connection.execute(query)]
