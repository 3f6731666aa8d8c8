"""Connections to SQLite and PostgreSQL, with their bounds; and what their errors are called."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite
import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from services.runtime.disk import full_disk, is_full
from services.runtime.errors import InvalidArgumentError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

DEPENDENCY = "state"
SQLITE = "sqlite:///"
_SERVERS = ("postgresql://", "postgres://")
_GRACE_S = 2.0
_CACHE_KIB = 16 * 1024
_LOST = (InterfaceError, OperationalError, OSError, asyncpg.InterfaceError)
_DISK_FULL = "53100"
_NOT_TEXT = "22021"
_AWAY = ("08", "53", "57", "40", "55P03", "25P03")
"""SQLSTATEs of what passes: connections, resources, stops and cancelled statements, conflicts, locks."""


def unavailable(why: str = "the state's database cannot be reached") -> UnavailableError:
    """The one error for a database that does not answer now; a change may have been made all the same."""
    return UnavailableError(why, dependency=DEPENDENCY, reason="STATE_UNAVAILABLE", retry_after_s=1)


def is_server(url: str) -> bool:
    """Whether this is a PostgreSQL's URL; else it is that of a SQLite file.

    Raises:
        InvalidArgumentError: It is neither; the text does not repeat it.
    """
    if url.startswith(_SERVERS):
        return True
    if url.startswith(SQLITE) and len(url) > len(SQLITE):
        return False
    raise InvalidArgumentError(
        "must be postgresql://user:password@host:port/database or sqlite:///file", field="queueing.state_url"
    )


class _Connection(sqlite3.Connection):
    """A connection that leaves no transaction behind when it is closed.

    Whoever is cancelled within a statement leaves it unfinished, held by the frames of the cancellation's
    traceback. SQLite keeps a closed connection with such a statement, and its transaction with the lock that
    keeps all others from writing, until the statement is freed.
    """

    def close(self) -> None:
        """Take back what was not committed, then close; a second time nothing is done."""
        with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
            self.rollback()
        super().close()


def sqlite_engine(url: str, *, wait_s: float, readers: int) -> AsyncEngine:
    """An engine whose connections are durable at each commit; see `reading` for transactions."""
    file = Path(url.removeprefix(SQLITE))

    async def connect() -> aiosqlite.Connection:
        connection = aiosqlite.connect(file, timeout=wait_s, isolation_level=None, factory=_Connection)
        connection._thread.daemon = True  # noqa: SLF001 - as SQLAlchemy does with connections of its own making
        try:
            await connection
            # Debian's SQLite else writes zeros over every row that is deleted.
            safe = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
            for pragma in (*safe, "secure_delete = OFF", f"cache_size = -{_CACHE_KIB}"):
                await connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.stop()  # without waiting for its thread: whoever wanted it may be cancelled
            raise
        return connection

    engine = create_async_engine(
        "sqlite+aiosqlite:///file",
        async_creator=connect,
        pool_size=readers + 1,
        max_overflow=0,
        pool_timeout=wait_s,
    )

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that turns from reading to writing fails when another has written meanwhile.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def server_engine(
    url: str, *, connect_s: float, statement_s: float, wait_s: float, pool_size: int
) -> AsyncEngine:
    """An engine for PostgreSQL; with `pool_size` 0 each use has a connection of its own."""
    settings = {
        "application_name": "plexus-queueing",
        "timezone": "UTC",
        "statement_timeout": str(round(statement_s * 1000)),
        "lock_timeout": str(round(statement_s * 1000)),
        # Of a replica that stopped in the middle: what it locked is free again.
        "idle_in_transaction_session_timeout": str(round(statement_s * 2000)),
    }

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(
                url,
                timeout=connect_s,
                command_timeout=statement_s + _GRACE_S,  # for a server that has fallen silent
                server_settings=settings,
            )
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _named(error) from error

    pool: dict[str, Any] = (
        {
            "pool_size": pool_size,
            "max_overflow": 0,
            "pool_timeout": wait_s,
            "pool_pre_ping": True,  # after a restart of the server the pool is made anew
            "pool_use_lifo": True,
        }
        if pool_size
        else {"poolclass": NullPool}
    )
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, **pool)


def _named(error: BaseException) -> Exception:
    if isinstance(error, asyncpg.ClientConfigurationError):
        return InvalidArgumentError("is no URL of a PostgreSQL", field="queueing.state_url")
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return unavailable("the state's database refuses our credentials")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return unavailable("the state's server has no such database")
    return unavailable()


@contextlib.contextmanager
def state_errors() -> Iterator[None]:
    """Name what a database raises.

    Raises:
        UnavailableError: It cannot be reached, is stopping, or did not do it in time.
        ResourceExhaustedError: Its disk is full.
        InvalidArgumentError: PostgreSQL was given a text with the character NUL.
    """
    try:
        yield
    except PlexusError:
        raise
    except (DBAPIError, PoolTimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresError) as error:
        failure = _translated(error)
        if failure is None:
            raise
        raise failure from error


def _translated(error: Exception) -> Exception | None:
    origin = (error.orig if isinstance(error, DBAPIError) else None) or error
    code = getattr(origin, "sqlstate", None) or ""
    if is_full(origin) or code == _DISK_FULL:
        return full_disk()
    if code == _NOT_TEXT:  # of a name somebody asked for; SQLite keeps it
        return InvalidArgumentError("a text must not have the character NUL", reason="INVALID_TEXT")
    if isinstance(error, PoolTimeoutError):
        return unavailable("all connections to the state's database are in use")
    if isinstance(origin, sqlite3.Error):
        busy = (getattr(origin, "sqlite_errorcode", 0) & 0xFF) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
        return unavailable("another process has locked the state's file") if busy else None
    if code:
        return unavailable() if code.startswith(_AWAY) else None
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return unavailable() if lost or isinstance(error, _LOST) else None
