"""Full-text search in this process: one Tantivy index each, one writer thread for all.

Writes of concurrent callers are committed together. A writer needs tens of MiB, so it exists only while an
index is being written to, and only for a few indexes at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from services.runtime.disk import full_disk
from services.runtime.durable import discard
from services.runtime.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError
from services.runtime.group_commit import GroupCommit
from services.search.backends.tantivy_files import IndexFiles
from services.search.backends.tantivy_open import OpenIndex, create_files
from services.search.config import SearchConfig
from services.search.domain import (
    Document,
    DocumentError,
    Index,
    Indexed,
    IndexSpec,
    Query,
    Results,
    typed_values,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from services.search.backends.tantivy_open import Row

ResultT = TypeVar("ResultT")

READ_THREADS = 2
MAX_GROUP_WRITES = 256


@dataclass(frozen=True, slots=True)
class Write:
    """A job of the writer thread: what to do, and the index to commit afterwards, if any."""

    apply: Callable[[], object]
    index: OpenIndex | None = None


class TantivyIndex:
    """The SearchIndex on Tantivy. Made by `open`."""

    def __init__(self, files: IndexFiles, config: SearchConfig) -> None:
        self._files = files
        self._config = config
        self._indexes = {stored.spec.name: OpenIndex(stored) for stored in files.load()}
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="search-read")
        self._writer: GroupCommit[Write] = GroupCommit(
            self._commit,
            name="search-write",
            max_group_size=MAX_GROUP_WRITES,
            max_waiting=config.max_waiting_writes,
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, config: SearchConfig | None = None) -> AsyncIterator[TantivyIndex]:
        """Open the indexes in a folder of their own.

        Raises:
            DataLossError: An index's description is damaged.
        """
        index = cls(IndexFiles(folder / "indexes"), config or SearchConfig())
        async with AsyncExitStack() as stack:
            stack.callback(index._close)
            stack.callback(index._readers.shutdown)
            await stack.enter_async_context(index._writer)
            yield index

    def _close(self) -> None:
        for index in self._indexes.values():
            index.close_writer()
        self._indexes.clear()

    # --- indexes

    async def create_index(self, spec: IndexSpec, *, request_id: str = "") -> Index:
        """As SearchIndex.create_index."""
        await self._writer.submit(Write(partial(self._create, spec, request_id)))
        return await self.index(spec.name)

    def _create(self, spec: IndexSpec, request_id: str) -> None:
        existing = self._indexes.get(spec.name)
        if existing is not None:
            if request_id and (existing.stored.request_id, existing.spec) == (request_id, spec):
                return
            raise AlreadyExistsError(
                f"there is an index {spec.name}", reason="INDEX_EXISTS", metadata={"index": spec.name}
            )
        if len(self._indexes) >= self._config.max_indexes:
            raise ResourceExhaustedError(
                f"there are {self._config.max_indexes} indexes, the most allowed", reason="TOO_MANY_INDEXES"
            )
        self._check_disk()
        stored = self._files.create(spec, request_id, lambda folder: create_files(folder, spec))
        self._indexes[spec.name] = OpenIndex(stored)

    async def index(self, name: str) -> Index:
        """As SearchIndex.index."""
        found = self._index(name)
        return Index(found.spec, found.stored.created_at, await self._read(found.count))

    async def spec(self, name: str) -> IndexSpec:
        """As SearchIndex.spec."""
        return self._index(name).spec

    async def indexes(self, *, after: str = "", limit: int) -> list[Index]:
        """As SearchIndex.indexes."""
        names = sorted(name for name in self._indexes if name > after)[:limit]
        found = []
        for name in names:
            try:
                found.append(await self.index(name))
            except NotFoundError:  # deleted meanwhile
                continue
        return found

    async def delete_index(self, name: str) -> None:
        """As SearchIndex.delete_index."""
        index = self._index(name)
        trash: Path | None = await self._writer.submit(Write(partial(self._delete_index, index)))
        if trash is not None:
            await self._read(partial(discard, trash))

    def _delete_index(self, index: OpenIndex) -> Path | None:
        if index.deleted:
            return None
        trash = self._files.remove(index.stored)
        index.deleted = True
        index.forget()
        del self._indexes[index.spec.name]
        return trash

    # --- writes

    async def add(self, index: str, documents: Sequence[Document]) -> Indexed:
        """As SearchIndex.add."""
        found = self._index(index)
        loop = asyncio.get_running_loop()
        rows, errors = await loop.run_in_executor(
            self._readers, rows_of, found.spec, documents, self._config.max_document_bytes
        )
        if rows:
            await self._writer.submit(Write(partial(self._add, found, rows), found))
        return Indexed(len(documents) - len(errors), tuple(errors))

    def _add(self, index: OpenIndex, rows: Sequence[Row]) -> None:
        self._check_disk()
        self._ready(index)
        index.add(rows)

    async def delete(self, index: str, query: Query) -> int:
        """As SearchIndex.delete."""
        found = self._index(index)
        deleted: int = await self._writer.submit(Write(partial(self._delete, found, query), found))
        return deleted

    def _delete(self, index: OpenIndex, query: Query) -> int:
        self._ready(index)
        return index.delete(query)

    def _ready(self, index: OpenIndex) -> None:
        """See to it that an index has a writer, at the cost of another's if there are too many."""
        if index.deleted:
            raise _unknown(index.spec.name)
        if not index.has_writer:
            writing = sorted(
                (entry for entry in self._indexes.values() if entry.has_writer),
                key=lambda entry: entry.used_at,
            )
            for entry in writing[: len(writing) + 1 - self._config.max_open_writers]:
                entry.commit()
                entry.close_writer()
        index.open_writer(self._config.writer_heap_bytes)

    def _commit(self, writes: Sequence[Write]) -> list[object]:
        """Apply a group of writes, then commit each index once. Runs in the writer thread."""
        results: list[object] = []
        applied: dict[int, list[int]] = {}
        indexes: dict[int, OpenIndex] = {}
        for number, write in enumerate(writes):
            try:
                results.append(write.apply())
            except Exception as error:  # noqa: BLE001 - told to the caller of this write alone
                results.append(error)
            if write.index is not None:
                indexes[id(write.index)] = write.index
                applied.setdefault(id(write.index), []).append(number)
        for key, index in indexes.items():
            try:
                index.commit()
            except Exception as error:  # noqa: BLE001 - told to every caller whose write was in this commit
                for number in applied[key]:
                    if not isinstance(results[number], Exception):
                        results[number] = self._disk_error(error)
        return results

    async def close_idle_writers(self) -> None:
        """Give back the memory of writers that were not used lately; `keep_lean` does it again and again."""
        await self._writer.submit(Write(self._close_idle))

    async def keep_lean(self) -> None:
        """Close idle writers until cancelled."""
        while True:
            await asyncio.sleep(self._config.writer_idle_s / 2)
            if any(index.has_writer for index in self._indexes.values()):
                await self.close_idle_writers()

    def _close_idle(self) -> None:
        oldest = time.monotonic() - self._config.writer_idle_s
        for index in self._indexes.values():
            if index.has_writer and index.used_at < oldest:
                index.commit()
                index.close_writer()

    def _free_disk(self) -> int:
        disk = os.statvfs(self._files.root)
        return disk.f_bavail * disk.f_frsize

    def _check_disk(self) -> None:
        if self._free_disk() < self._config.min_free_disk_bytes:
            raise full_disk()

    def _disk_error(self, error: Exception) -> Exception:
        return full_disk() if "No space left" in str(error) else error

    # --- reads

    async def document(self, index: str, identifier: str) -> Document:
        """As SearchIndex.document."""
        return await self._read(partial(self._index(index).document, identifier))

    async def search(self, index: str, query: Query) -> Results:
        """As SearchIndex.search."""
        return await self._read(partial(self._index(index).search, query))

    async def _read(self, read: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    def _index(self, name: str) -> OpenIndex:
        index = self._indexes.get(name)
        if index is None:
            raise _unknown(name)
        return index


def rows_of(
    spec: IndexSpec, documents: Sequence[Document], max_bytes: int
) -> tuple[list[Row], list[DocumentError]]:
    """Make documents ready for the engine; of two with one id the later counts."""
    rows: dict[str, Row] = {}
    errors: list[DocumentError] = []
    for position, document in enumerate(documents):
        values = typed_values(spec, document, position)
        if isinstance(values, DocumentError):
            errors.append(values)
            continue
        where = f"documents[{position}].fields"
        try:
            source = json.dumps(
                document.fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode()
        except ValueError:
            errors.append(DocumentError(position, document.id, where, "has a number that is NaN or infinite"))
            continue
        if len(source) > max_bytes:
            text = f"has {len(source)} bytes as JSON, at most {max_bytes} are allowed"
            errors.append(DocumentError(position, document.id, where, text))
            continue
        rows[document.id] = (document.id, source, values)
    return list(rows.values()), errors


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no index {name[:128]!r}", reason="INDEX_NOT_FOUND", metadata={"index": name[:128]}
    )
