"""One file, one writer thread, and who is to be woken when it has committed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Self, TypeVar, cast
from urllib.parse import quote

from services.queueing.backends.sqlite.migrations import MIGRATIONS
from services.runtime.database import connect
from services.runtime.disk import full_disk, is_full
from services.runtime.errors import PlexusError
from services.runtime.group_commit import GroupCommit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

_MAX_GROUP = 512
_PAGE_BYTES = 8192
_CACHE_KIB = 32 * 1024
"""A transaction that does not fit is written in pieces, and some of its pages with each."""
_CHECKPOINT_PAGES = 2000

Job = Callable[[], object]
Result = TypeVar("Result")


class Database:
    """Runs jobs, functions that use `connection`, in groups that become durable together.

    Attributes:
        connection: Used by jobs alone, since it belongs to the writer's thread.
        touched: Subscriptions with news; jobs add to it, and after the commit their pullers are woken.
        on_rollback: Called when a job's changes are taken back, to forget what was remembered of them.
    """

    def __init__(self, file: Path, *, max_waiting: int, full_sync: bool = True) -> None:
        """Open the file, made if need be, and bring its schema up to date.

        Args:
            file: The database.
            max_waiting: Jobs that may wait for the disk; one more is refused.
            full_sync: Whether a commit waits until the disk has it, so that it survives the loss of power;
                else it survives the death of the process only.
        """
        self._file = file.absolute()
        self.connection = connect(file, MIGRATIONS, page_bytes=_PAGE_BYTES)
        for pragma in (
            f"cache_size = -{_CACHE_KIB}",
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
            # Debian's SQLite else writes zeros over every message that is done with.
            "secure_delete = OFF",
        ):
            self.connection.execute(f"PRAGMA {pragma}")
        if not full_sync:
            self.connection.execute("PRAGMA synchronous = NORMAL")
        self.touched: set[str] = set()
        self.on_rollback: list[Callable[[], None]] = []
        self._news: dict[str, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commits: GroupCommit[Job] = GroupCommit(
            self._commit, name="queueing", max_group_size=_MAX_GROUP, max_waiting=max_waiting
        )

    async def __aenter__(self) -> Self:
        """Start the writer."""
        self._loop = asyncio.get_running_loop()
        await self._commits.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what was taken and close."""
        await self._commits.__aexit__(kind, error, trace)
        self.connection.close()

    async def run(self, job: Callable[[], Result]) -> Result:
        """Wait until a job is durable, and give what it returned.

        Raises:
            PlexusError: What the job raised; its changes are undone, and nobody else's.
        """
        return cast("Result", await self._commits.submit(job))

    def beside(self, read: Callable[[sqlite3.Connection], Result]) -> Result:
        """Read on a connection of its own, as of one moment, in whatever thread this is called."""
        with closing(sqlite3.connect(f"file:{quote(str(self._file))}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            return read(connection)

    def news(self, subscription: str) -> asyncio.Event:
        """Set when the subscription is next touched. Take it before looking, so that nothing is missed."""
        return self._news.setdefault(subscription, asyncio.Event())

    def _wake(self, subscriptions: set[str]) -> None:
        for name in subscriptions:
            event = self._news.pop(name, None)
            if event is not None:
                event.set()

    def _forget(self) -> None:
        for forget in self.on_rollback:
            forget()

    def _commit(self, jobs: Sequence[Job]) -> list[object]:
        """Run jobs in one transaction; each in a savepoint, so that one's failure is its own."""
        results: list[object] = []
        db = self.connection
        self.touched = set()
        try:
            db.execute("BEGIN IMMEDIATE")
            for job in jobs:
                db.execute("SAVEPOINT job")
                try:
                    results.append(job())
                except PlexusError as error:
                    db.execute("ROLLBACK TO job")
                    self._forget()
                    results.append(error)
                db.execute("RELEASE job")
            db.execute("COMMIT")
        except BaseException as error:
            self._forget()
            if db.in_transaction:
                db.execute("ROLLBACK")
            if is_full(error):
                raise full_disk() from error
            raise
        if self.touched and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake, self.touched)
        return results
