"""The database of the state."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite

from services.queueing.state.engine import is_server, server_engine, sqlite_engine, state_errors, unavailable
from services.queueing.state.schema import Schema, migrate
from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from types import TracebackType

    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log = structlog.get_logger(__name__)

_MIGRATION_S = 300.0
_RETRY_S = 0.5
_READERS = 4


class Database:
    """SQLite or PostgreSQL behind SQLAlchemy's core; open it with `async with`.

    When the server is away calls raise UnavailableError, and go through again as soon as it is back. An error
    of `transaction` leaves open whether the change was made: write so that it may be repeated.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        connect_s: float = 5.0,
        statement_s: float = 15.0,
        wait_s: float = 15.0,
        start_s: float = 60.0,
    ) -> None:
        """Set it up; connections are made when needed.

        Args:
            url: `sqlite:///` and a file, made if need be; or `postgresql://user:password@host:port/database`
                with libpq's parameters, such as those of TLS: `sslmode`, `sslrootcert`, `sslcert`, `sslkey`.
            pool_size: Most connections to a server.
            connect_s: How long a connection may take to be made.
            statement_s: How long a statement may take.
            wait_s: How long a caller waits for a connection, or for SQLite's writers before it.
            start_s: How long the first migration waits for a server that does not answer yet.

        Raises:
            InvalidArgumentError: The URL is none of these.
        """
        self.shared = is_server(url)
        self._wait_s = wait_s
        self._start_s = start_s
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        if self.shared:
            bounds = {"connect_s": connect_s, "wait_s": wait_s}
            self._engine = server_engine(url, statement_s=statement_s, pool_size=pool_size, **bounds)
            self._migrating = server_engine(url, statement_s=_MIGRATION_S, pool_size=0, **bounds)
        else:
            self._engine = self._migrating = sqlite_engine(url, wait_s=wait_s, readers=_READERS)
        self._reading = self._engine.execution_options(reads=True)

    async def __aenter__(self) -> Self:
        """Nothing yet: the first use connects."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._engine.dispose()
        await self._migrating.dispose()

    async def migrate(self, schema: Schema) -> None:
        """Bring a room's tables up to date; to be awaited before they are used.

        Raises:
            FailedPreconditionError: They were made by a newer version.
            UnavailableError: The server did not answer in all the time that a start may take.
        """
        deadline = time.monotonic() + self._start_s
        while True:
            try:
                async with self._write(self._migrating) as connection:
                    steps = await connection.run_sync(migrate, schema)
                break
            except UnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("state_away", reason=error.message)
                await asyncio.sleep(_RETRY_S)
        if steps:
            log.info("state_migrated", room=schema.room, steps=steps)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may write: all of the block, or nothing if it raises.

        With SQLite one at a time, so a block waits for nothing but the database.

        Raises:
            UnavailableError: The database cannot be reached or did not do it in time.
            ResourceExhaustedError: Its disk is full.
        """
        async with self._write(self._engine) as connection:
            yield connection

    @asynccontextmanager
    async def _write(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        if self.shared:
            async with self._begun(engine) as connection:
                yield connection
            return
        # In order of arrival, which SQLite's own wait for its lock does not keep.
        try:
            async with asyncio.timeout(self._wait_s):
                await self._writing.acquire()
        except TimeoutError:
            raise unavailable("too many changes of the state wait") from None
        try:
            async with self._begun(engine) as connection:
                yield connection
        finally:
            self._writing.release()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads, beside whatever writes; errors as in `transaction`."""
        async with self._begun(self._reading) as connection:
            yield connection

    @asynccontextmanager
    async def _begun(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        with state_errors():
            connection = await self._connected(engine)
            try:
                async with connection.begin():
                    yield connection
            finally:
                await asyncio.shield(self._kept(connection.close()))

    async def _connected(self, engine: AsyncEngine) -> AsyncConnection:
        """A connection; a caller that goes away while it is being made leaves none behind."""
        connection = engine.connect()
        making = self._kept(connection.start())
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(
                lambda made: None if made.cancelled() or made.exception() else self._kept(connection.close())
            )
            raise
        return connection

    def _kept(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that knows `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return postgresql.insert(table) if self.shared else sqlite.insert(table)

    async def now(self, connection: AsyncConnection) -> float:
        """Seconds since 1970 by the one clock that all replicas share."""
        if not self.shared:
            return time.time()
        clock: Any = func.extract("epoch", func.clock_timestamp())
        return float((await connection.execute(select(clock))).scalar_one())
