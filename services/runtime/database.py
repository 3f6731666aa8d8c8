"""SQLite files that survive a crash and an upgrade."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def connect(file: Path, migrations: Sequence[str], *, page_bytes: int = 4096) -> sqlite3.Connection:
    """Open a database, durable at each commit, and bring its schema up to date.

    Args:
        file: Made if it does not exist.
        migrations: Scripts, oldest first; never changed once released, only added to. The file remembers how
            many it has seen (`PRAGMA user_version`). Each runs in a transaction of its own.
        page_bytes: What is written at least; a power of two. A file that exists keeps what it was made with.

    Returns:
        A connection in autocommit mode for one thread at a time.

    Raises:
        FailedPreconditionError: The file was written by a newer version.
    """
    database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    try:
        database.execute(f"PRAGMA page_size = {page_bytes}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        (seen,) = database.execute("PRAGMA user_version").fetchone()
        if seen > len(migrations):
            raise FailedPreconditionError(
                f"{file.name} was written by a newer version of Plexus: update, or restore a backup",
                reason="STATE_TOO_NEW",
            )
        for version in range(seen, len(migrations)):
            database.executescript(
                f"BEGIN IMMEDIATE;\n{migrations[version]}\nPRAGMA user_version = {version + 1};\nCOMMIT;"
            )
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Store all of what is done within, or nothing of it if that raises."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
