"""What knowledge remembers: collections, documents, operations and the tasks still to be queued."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from services.knowledge.domain import (
    ChunkingPolicy,
    Collection,
    Document,
    Failure,
    Operation,
    State,
    Task,
    document_id,
)
from services.runtime.database import connect, transaction
from services.runtime.disk import disk_errors
from services.runtime.errors import AlreadyExistsError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

_MIGRATIONS = (
    """
CREATE TABLE IF NOT EXISTS collections (
    name TEXT PRIMARY KEY, target INTEGER NOT NULL, overlap INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (
    collection TEXT NOT NULL REFERENCES collections (name) ON DELETE CASCADE, uri TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, content_type TEXT NOT NULL, state TEXT NOT NULL,
    error TEXT NOT NULL, chunks INTEGER NOT NULL, sha256 TEXT NOT NULL, version TEXT NOT NULL,
    updated REAL NOT NULL, PRIMARY KEY (collection, uri)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS operations (
    id TEXT PRIMARY KEY, collection TEXT NOT NULL, total INTEGER NOT NULL, unchanged INTEGER NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, operation TEXT NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
    collection TEXT NOT NULL, document TEXT NOT NULL, uri TEXT NOT NULL, content_type TEXT NOT NULL,
    sha256 TEXT NOT NULL, queued INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'pending',
    error TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_by_operation ON tasks (operation);
CREATE INDEX IF NOT EXISTS tasks_to_queue ON tasks (queued) WHERE queued = 0;
""",
)
_DOCUMENT = "id, collection, uri, title, content_type, state, error, chunks, sha256, version, updated"
MAX_FAILURES = 100

T = TypeVar("T")


class KnowledgeStore:
    """One SQLite file, one thread; open it with `async with`."""

    def __init__(self, file: Path) -> None:
        self._db = connect(file, _MIGRATIONS)
        self._thread = ThreadPoolExecutor(1, "knowledge-store")

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish and close."""
        self._thread.shutdown(wait=True)
        self._db.close()

    async def _run(self, work: Callable[[], T]) -> T:
        with disk_errors():
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # Collections.

    async def create_collection(self, collection: Collection) -> Collection:
        """Add a collection.

        Raises:
            AlreadyExistsError: There is one of this name.
        """
        policy = collection.chunking

        def work() -> Collection:
            row = (collection.name, policy.target, policy.overlap, time.time())
            try:
                self._db.execute("INSERT INTO collections VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise AlreadyExistsError(
                    f"collection {collection.name!r} exists",
                    reason="COLLECTION_EXISTS",
                    metadata={"collection": collection.name},
                ) from error
            return self._collection(collection.name)

        return await self._run(work)

    def _collection(self, name: str) -> Collection:
        row = self._db.execute(
            "SELECT name, target, overlap, created, (SELECT count(*) FROM documents"
            " WHERE collection = name AND version != '') FROM collections WHERE name = ?",
            (name,),
        ).fetchone()
        if row is None:
            raise NotFoundError(
                f"no collection {name!r}", reason="COLLECTION_NOT_FOUND", metadata={"collection": name}
            )
        return Collection(row[0], ChunkingPolicy(row[1], row[2]), row[3], row[4])

    async def collection(self, name: str) -> Collection:
        """Get a collection.

        Raises:
            NotFoundError: There is none.
        """
        return await self._run(lambda: self._collection(name))

    async def collections(self, *, limit: int, after: str = "") -> list[Collection]:
        """Collections in order of names."""

        def work() -> list[Collection]:
            rows = self._db.execute(
                "SELECT name FROM collections WHERE name > ? ORDER BY name LIMIT ?", (after, limit)
            ).fetchall()
            return [self._collection(row[0]) for row in rows]

        return await self._run(work)

    async def delete_collection(self, name: str) -> None:
        """Forget a collection and its documents."""
        await self._run(lambda: self._db.execute("DELETE FROM collections WHERE name = ?", (name,)))

    # Documents.

    async def document(self, collection: str, document: str) -> Document:
        """Get a document.

        Raises:
            NotFoundError: There is none.
        """

        def work() -> Document:
            self._collection(collection)
            row = self._db.execute(
                f"SELECT {_DOCUMENT} FROM documents WHERE id = ? AND collection = ?",  # noqa: S608 - constant
                (document, collection),
            ).fetchone()
            if row is None:
                raise NotFoundError(
                    f"no document {document!r}",
                    reason="DOCUMENT_NOT_FOUND",
                    metadata={"document": document},
                )
            return _document(row)

        return await self._run(work)

    async def documents(self, collection: str, *, limit: int, after: str = "") -> list[Document]:
        """Documents in order of URIs."""

        def work() -> list[Document]:
            self._collection(collection)
            rows = self._db.execute(
                f"SELECT {_DOCUMENT} FROM documents WHERE collection = ? AND uri > ?"  # noqa: S608 - constant
                " ORDER BY uri LIMIT ?",
                (collection, after, limit),
            )
            return [_document(row) for row in rows]

        return await self._run(work)

    async def versions(self, documents: Sequence[str]) -> dict[str, Document]:
        """The documents of these ids, as far as they exist."""

        def work() -> dict[str, Document]:
            marks = ",".join("?" * len(documents))
            rows = self._db.execute(
                f"SELECT {_DOCUMENT} FROM documents WHERE id IN ({marks})",  # noqa: S608 - question marks
                tuple(documents),
            )
            return {row[0]: _document(row) for row in rows}

        return await self._run(work)

    async def make_ready(self, task: Task, *, title: str, chunks: int) -> bool:
        """Make a task's version the searchable one; false if it was overtaken or the document deleted."""

        def work() -> bool:
            changed = self._db.execute(
                "UPDATE documents SET state = ?, error = '', title = ?, chunks = ?, version = ?, updated = ?"
                " WHERE id = ? AND sha256 = ?",
                (State.READY, title, chunks, task.sha256, time.time(), task.document, task.sha256),
            )
            return changed.rowcount == 1

        return await self._run(work)

    async def delete_document(self, document: str) -> None:
        """Forget a document."""
        await self._run(lambda: self._db.execute("DELETE FROM documents WHERE id = ?", (document,)))

    # Operations.

    async def take(
        self, collection: str, inputs: Sequence[tuple[str, str, str]]
    ) -> tuple[Operation, list[Task]]:
        """Record an operation and its tasks, durable on return.

        Args:
            collection: Name.
            inputs: URI, media type and SHA-256 of each document.

        Returns:
            The operation, and the tasks of documents that are not the same as before.
        """

        def work() -> tuple[str, list[Task]]:
            operation = uuid.uuid4().hex
            now = time.time()
            tasks: list[Task] = []
            with transaction(self._db):
                self._collection(collection)
                row = (operation, collection, len(inputs), 0, now)
                self._db.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?)", row)
                for uri, content_type, sha256 in inputs:
                    task = self._take(operation, collection, uri, content_type, sha256, now)
                    if task is not None:
                        tasks.append(task)
                self._db.execute(
                    "UPDATE operations SET unchanged = ? WHERE id = ?", (len(inputs) - len(tasks), operation)
                )
            return operation, tasks

        operation, tasks = await self._run(work)
        return await self.operation(operation), tasks

    def _take(
        self, operation: str, collection: str, uri: str, content_type: str, sha256: str, now: float
    ) -> Task | None:
        document = document_id(collection, uri)
        row = self._db.execute("SELECT version, state FROM documents WHERE id = ?", (document,)).fetchone()
        if row is not None and row == (sha256, State.READY.value):
            return None
        self._db.execute(
            f"INSERT INTO documents ({_DOCUMENT}) VALUES (?, ?, ?, ?, ?, ?, '', 0, ?, '', ?)"  # noqa: S608 - constant
            " ON CONFLICT (collection, uri) DO UPDATE SET content_type = excluded.content_type,"
            " state = excluded.state, error = '', sha256 = excluded.sha256, updated = excluded.updated",
            (document, collection, uri, uri, content_type, State.PENDING, sha256, now),
        )
        task = Task(uuid.uuid4().hex, operation, collection, document, uri, content_type, sha256)
        self._db.execute(
            "INSERT INTO tasks (id, operation, collection, document, uri, content_type, sha256)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (task.id, operation, collection, document, uri, content_type, sha256),
        )
        return task

    async def operation(self, operation: str) -> Operation:
        """Get an operation.

        Raises:
            NotFoundError: There is none.
        """

        def work() -> Operation:
            row = self._db.execute(
                "SELECT id, collection, total, unchanged, created FROM operations WHERE id = ?",
                (operation,),
            ).fetchone()
            if row is None:
                raise NotFoundError(f"no operation {operation!r}", reason="OPERATION_NOT_FOUND")
            counts = dict(
                self._db.execute(
                    "SELECT state, count(*) FROM tasks WHERE operation = ? GROUP BY state", (operation,)
                ).fetchall()
            )
            failures = self._db.execute(
                "SELECT uri, error FROM tasks WHERE operation = ? AND state = ? ORDER BY uri LIMIT ?",
                (operation, State.FAILED, MAX_FAILURES),
            )
            return Operation(
                id=row[0],
                collection=row[1],
                total=row[2],
                ready=counts.get(State.READY, 0),
                unchanged=row[3],
                failed=counts.get(State.FAILED, 0),
                failures=[Failure(*failure) for failure in failures],
                created=row[4],
            )

        return await self._run(work)

    # Tasks.

    async def task(self, task: str) -> tuple[Task, State] | None:
        """A task and where it stands, or None if it is not known (its collection is gone)."""

        def work() -> tuple[Task, State] | None:
            row = self._db.execute(
                "SELECT id, operation, collection, document, uri, content_type, sha256, state FROM tasks"
                " WHERE id = ?",
                (task,),
            ).fetchone()
            return None if row is None else (Task(*row[:7]), State(row[7]))

        return await self._run(work)

    async def unqueued(self, *, limit: int) -> list[str]:
        """Tasks whose message has not been published for sure."""
        query = "SELECT id FROM tasks WHERE queued = 0 LIMIT ?"
        return await self._run(lambda: [row[0] for row in self._db.execute(query, (limit,))])

    async def mark_queued(self, tasks: Sequence[str]) -> None:
        """Note that messages have been published."""
        rows = [(task,) for task in tasks]

        def work() -> None:
            with transaction(self._db):
                self._db.executemany("UPDATE tasks SET queued = 1 WHERE id = ?", rows)

        await self._run(work)

    async def finish(self, task: Task, state: State, error: str = "") -> None:
        """End a task; a failure is the document's too, unless a newer content has been taken meanwhile."""

        def work() -> None:
            with transaction(self._db):
                self._db.execute(
                    "UPDATE tasks SET state = ?, error = ? WHERE id = ?", (state, error, task.id)
                )
                if state is State.FAILED:
                    self._db.execute(
                        "UPDATE documents SET state = ?, error = ?, updated = ? WHERE id = ? AND sha256 = ?",
                        (state, error, time.time(), task.document, task.sha256),
                    )

        await self._run(work)


def _document(row: tuple[Any, ...]) -> Document:
    document, collection, uri, title, content_type, state, error, chunks, sha256, version, updated = row
    return Document(
        id=document,
        collection=collection,
        uri=uri,
        title=title,
        content_type=content_type,
        state=State(state),
        error=error,
        chunks=chunks,
        sha256=sha256,
        version=version,
        updated=updated,
    )
