"""Who of several replicas has something, until it is given back or not renewed in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Column, Double, MetaData, Table, Text, delete, exists, select, update

from services.queueing.state.schema import Schema

if TYPE_CHECKING:
    from collections.abc import Iterable

    from alembic.operations import Operations
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.state.database import Database

METADATA = MetaData()
_LEASES = Table(
    "leases",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("until", Double, nullable=False),
)


def _first(operations: Operations) -> None:
    operations.create_table(
        "leases",
        Column("name", Text, primary_key=True),
        Column("owner", Text, nullable=False),
        Column("until", Double, nullable=False),
    )


SCHEMA = Schema("leases", METADATA, (_first,))


class Leases:
    """Leases by the database's clock; `migrate` with SCHEMA before.

    Raises:
        UnavailableError: From every method: the database cannot be reached.
    """

    def __init__(self, database: Database, *, ttl_s: float) -> None:
        self._database = database
        self.ttl_s = ttl_s

    async def take(self, name: str, owner: str) -> str:
        """Take a lease, or renew it; who has it now."""
        async with self._database.transaction() as connection:
            now = await self._database.now(connection)
            values = {"name": name, "owner": owner, "until": now + self.ttl_s}
            statement = self._database.insert(_LEASES).values(values)
            given = statement.excluded
            taken = statement.on_conflict_do_update(
                index_elements=[_LEASES.c.name],
                set_={"owner": given.owner, "until": given.until},
                where=(_LEASES.c.owner == given.owner) | (_LEASES.c.until <= now),
            ).returning(_LEASES.c.owner)
            if (await connection.execute(taken)).first():
                return owner
            query = select(_LEASES.c.owner).where(_LEASES.c.name == name)
            return (await connection.execute(query)).scalar() or ""

    async def renew(self, owner: str, names: Iterable[str]) -> set[str]:
        """Keep leases; which of them are still the owner's."""
        async with self._database.transaction() as connection:
            now = await self._database.now(connection)
            kept = (
                update(_LEASES)
                .where(_LEASES.c.owner == owner, _LEASES.c.name.in_(set(names)))
                .values(until=now + self.ttl_s)
                .returning(_LEASES.c.name)
            )
            return set((await connection.execute(kept)).scalars())

    async def release(self, owner: str, names: Iterable[str] | None = None) -> None:
        """Give leases back, all of the owner's if none are named."""
        statement = delete(_LEASES).where(_LEASES.c.owner == owner)
        if names is not None:
            statement = statement.where(_LEASES.c.name.in_(set(names)))
        async with self._database.transaction() as connection:
            await connection.execute(statement)

    @staticmethod
    async def keeps(connection: AsyncConnection, name: str, owner: str) -> bool:
        """Whether the owner has a lease, and nobody else takes it before the transaction ends."""
        query = select(_LEASES.c.owner).where(_LEASES.c.name == name).with_for_update(read=True)
        return (await connection.execute(query)).scalar() == owner

    @staticmethod
    def nobody_has(name: ColumnElement[str], now: float) -> ColumnElement[bool]:
        """Whether a lease has ended or been given back, as a part of a statement."""
        return ~exists().where(_LEASES.c.name == name, _LEASES.c.until > now)

    async def owners(self, prefix: str) -> list[str]:
        """Who has a lease whose name begins so."""
        async with self._database.reading() as connection:
            now = await self._database.now(connection)
            here = _LEASES.c.name.startswith(prefix, autoescape=True)
            query = select(_LEASES.c.owner).where(here, _LEASES.c.until > now)
            return list((await connection.execute(query)).scalars())
