"""Vectors in this process: one Qdrant Edge shard a collection.

Writes go through one thread (group commit), which applies them and then makes the shards' write-ahead logs
durable with one fsync each. Reads run in threads of their own and see every applied write.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import qdrant_edge as engine

from services.runtime.disk import full_disk
from services.runtime.durable import discard
from services.runtime.errors import AlreadyExistsError, NotFoundError, ResourceExhaustedError
from services.runtime.group_commit import GroupCommit
from services.vectors.backends import qdrant_points
from services.vectors.backends.qdrant_files import CollectionFiles, sync_log
from services.vectors.backends.qdrant_shards import Shard, Write, load, unknown
from services.vectors.config import VectorsConfig
from services.vectors.domain import (
    Collection,
    CollectionSpec,
    Filter,
    Page,
    Point,
    Query,
    ScoredPoint,
    Selection,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

ResultT = TypeVar("ResultT")

SEARCH_THREADS = 2
"""Threads of each open shard for segments searched in parallel, and threads of the store for reads."""
MAX_GROUP_WRITES = 64


@dataclass(slots=True)
class _Group:
    results: list[object] = field(default_factory=list)
    touched: dict[int, Shard] = field(default_factory=dict)


class QdrantEdgeStore:
    """The VectorStore on Qdrant Edge. Made by `open`."""

    def __init__(self, files: CollectionFiles, config: VectorsConfig) -> None:
        self._files = files
        self._config = config
        self._shards = {stored.spec.name: Shard(stored) for stored in files.load()}
        self._readers = ThreadPoolExecutor(SEARCH_THREADS, thread_name_prefix="vectors-read")
        self._opening = asyncio.Lock()
        self.writer: GroupCommit[Write] = GroupCommit(
            self._commit,
            name="vectors-write",
            max_group_size=MAX_GROUP_WRITES,
            max_waiting=config.max_waiting_writes,
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, config: VectorsConfig | None = None) -> AsyncIterator[QdrantEdgeStore]:
        """Open the store in a folder of its own; close it with everything flushed.

        Raises:
            DataLossError: A collection's description is damaged.
        """
        store = cls(CollectionFiles(folder / "collections"), config or VectorsConfig())
        async with AsyncExitStack() as stack:
            stack.callback(store._close_shards)
            stack.callback(store._readers.shutdown)
            await stack.enter_async_context(store.writer)
            yield store

    def _close_shards(self) -> None:
        for shard in self._shards.values():
            if shard.engine is not None:
                shard.engine.flush()
                shard.engine.close()
                shard.engine = None

    # --- collections

    async def create_collection(self, spec: CollectionSpec, *, request_id: str = "") -> Collection:
        """As VectorStore.create_collection."""
        name: str = await self.writer.submit(Write(None, partial(self._create, spec, request_id)))
        return await self.collection(name)

    def _create(self, spec: CollectionSpec, request_id: str) -> str:
        existing = self._shards.get(spec.name)
        if existing is not None:
            if request_id and (existing.stored.request_id, existing.stored.spec) == (request_id, spec):
                return spec.name
            raise AlreadyExistsError(
                f"there is a collection {spec.name}",
                reason="COLLECTION_EXISTS",
                metadata={"collection": spec.name},
            )
        if len(self._shards) >= self._config.max_collections:
            raise ResourceExhaustedError(
                f"there are {self._config.max_collections} collections, the most allowed",
                reason="TOO_MANY_COLLECTIONS",
            )
        self.check_disk()
        stored = self._files.create(
            spec,
            request_id,
            lambda folder: qdrant_points.create_shard(_made(folder), spec, SEARCH_THREADS),
        )
        self._shards[spec.name] = Shard(stored)
        return spec.name

    async def collection(self, name: str) -> Collection:
        """As VectorStore.collection."""
        count = await self.count(name, Filter())
        stored = self._shard(name).stored
        return Collection(stored.spec, stored.created_at, count)

    async def spec(self, name: str) -> CollectionSpec:
        """As VectorStore.spec."""
        return self._shard(name).stored.spec

    async def collections(self, *, after: str = "", limit: int) -> list[Collection]:
        """As VectorStore.collections."""
        names = sorted(name for name in self._shards if name > after)[:limit]
        found = []
        for name in names:
            try:
                found.append(await self.collection(name))
            except NotFoundError:  # deleted meanwhile
                continue
        return found

    async def delete_collection(self, name: str) -> None:
        """As VectorStore.delete_collection."""
        shard = self._shard(name)
        trash: Path | None = await self.writer.submit(
            Write(shard, partial(self._delete_collection, shard), durable=False)
        )
        if trash is not None:
            await asyncio.get_running_loop().run_in_executor(self._readers, discard, trash)

    def _delete_collection(self, shard: Shard) -> Path | None:
        if shard.deleted:
            return None
        trash = self._files.remove(shard.stored)
        shard.deleted = True
        shard.journal = None
        del self._shards[shard.stored.spec.name]
        # Not closed: reads in progress hold the engine, and it goes with the last of them.
        shard.engine = None
        return trash

    # --- writes

    async def upsert(self, collection: str, points: Sequence[Point]) -> int:
        """As VectorStore.upsert."""
        if not points:
            return 0
        shard = self._shard(collection)
        await self._open(shard)
        batch = qdrant_points.points_to(points)
        operation = engine.UpdateOperation.upsert_points(batch)
        await self.writer.submit(Write(shard, partial(self._update, shard, operation, len(batch))))
        return len(points)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """As VectorStore.delete."""
        shard = self._shard(collection)
        await self._open(shard)
        keys = list({qdrant_points.engine_id(identifier) for identifier in ids})
        deleted: int = await self.writer.submit(Write(shard, partial(self._delete_ids, shard, keys)))
        return deleted

    async def delete_matching(self, collection: str, matching: Filter) -> int:
        """As VectorStore.delete_matching."""
        shard = self._shard(collection)
        await self._open(shard)
        condition = qdrant_points.filter_to(matching) or engine.Filter()
        deleted: int = await self.writer.submit(
            Write(shard, partial(self._delete_matching, shard, condition))
        )
        return deleted

    def _delete_ids(self, shard: Shard, keys: list[Any]) -> int:
        count = len(shard.live().retrieve(keys, False, False))  # noqa: FBT003 - the engine's signature
        if count:
            self._update(shard, engine.UpdateOperation.delete_points(keys), count)
        return count

    def _delete_matching(self, shard: Shard, condition: Any) -> int:
        count: int = shard.live().count(engine.CountRequest(filter=condition, exact=True))
        if count:
            self._update(shard, engine.UpdateOperation.delete_points_by_filter(condition), count)
        return count

    def _update(self, shard: Shard, operation: Any, points: int) -> None:
        self.check_disk()
        shard.live().update(operation)
        if shard.journal is not None:
            shard.journal.append(operation, points)
        shard.unflushed += points
        shard.changed += points

    def _commit(self, writes: Sequence[Write]) -> list[object]:
        """Apply a group of writes, then make it durable. Runs in the writer thread."""
        group = _Group()
        for write in writes:
            try:
                group.results.append(write.apply())
            except Exception as error:  # noqa: BLE001 - told to the caller of this write alone
                group.results.append(error)
            else:
                if write.shard is not None and write.durable:
                    group.touched[id(write.shard)] = write.shard
        for shard in group.touched.values():
            if shard.deleted:
                continue
            sync_log(shard.stored.shard_folder)
            if shard.unflushed >= self._config.flush_after_points:
                shard.engine.flush()
                shard.unflushed = 0
        return group.results

    def check_disk(self, needed_bytes: int = 0) -> None:
        """Check that there is room on the disk.

        Raises:
            ResourceExhaustedError: After taking so many bytes there would not be.
        """
        disk = os.statvfs(self._files.root)
        if disk.f_bavail * disk.f_frsize - needed_bytes < self._config.min_free_disk_bytes:
            raise full_disk()

    # --- reads

    async def search(self, collection: str, query: Query) -> list[ScoredPoint]:
        """As VectorStore.search."""
        vector: Any = query.vector  # the stubs say list; any sequence of numbers is taken
        request = engine.SearchRequest(
            query=engine.Query.Nearest(vector),
            limit=query.limit,
            offset=query.offset,
            filter=qdrant_points.filter_to(query.filter),
            with_payload=qdrant_points.payload_selector(query.selection),
            with_vector=query.selection.vector,
            score_threshold=query.score_threshold,
        )
        found: list[Any] = await self._read(collection, lambda shard: shard.search(request))
        return [ScoredPoint(qdrant_points.point_from(record), record.score) for record in found]

    async def points(self, collection: str, ids: Sequence[str], selection: Selection) -> list[Point]:
        """As VectorStore.points."""
        keys = [qdrant_points.engine_id(identifier) for identifier in ids]
        chosen = qdrant_points.payload_selector(selection)
        found: list[Any] = await self._read(
            collection, lambda shard: shard.retrieve(keys, chosen, selection.vector)
        )
        by_id = {point.id: point for point in map(qdrant_points.point_from, found)}
        return [by_id[identifier] for identifier in dict.fromkeys(ids) if identifier in by_id]

    async def scan(
        self, collection: str, matching: Filter, selection: Selection, *, after: str | None, limit: int
    ) -> Page:
        """As VectorStore.scan."""
        request = engine.ScrollRequest(
            offset=after,
            limit=limit,
            filter=qdrant_points.filter_to(matching),
            with_payload=qdrant_points.payload_selector(selection),
            with_vector=selection.vector,
        )
        found, following = await self._read(collection, lambda shard: shard.scroll(request))
        points = [qdrant_points.point_from(record) for record in found]
        return Page(points, None if following is None else str(following))

    async def count(self, collection: str, matching: Filter) -> int:
        """As VectorStore.count."""
        request = engine.CountRequest(filter=qdrant_points.filter_to(matching), exact=True)
        count: int = await self._read(collection, lambda shard: shard.count(request))
        return count

    async def _read(self, collection: str, read: Callable[[Any], ResultT]) -> ResultT:
        shard = self._shard(collection)
        opened = await self._open(shard)
        return await asyncio.get_running_loop().run_in_executor(self._readers, read, opened)

    # --- shards

    def _shard(self, name: str) -> Shard:
        shard = self._shards.get(name)
        if shard is None:
            raise unknown(name)
        return shard

    async def _open(self, shard: Shard) -> Any:
        """The engine's shard, loaded if this is its first use since the start."""
        if shard.engine is None:
            async with self._opening:
                if shard.engine is None:
                    if shard.deleted:
                        raise unknown(shard.stored.spec.name)
                    loop = asyncio.get_running_loop()
                    opened = await loop.run_in_executor(self._readers, load, shard.stored.shard_folder)
                    if not shard.deleted:
                        info = opened.info()
                        shard.changed = max(0, info.points_count - info.indexed_vectors_count)
                        shard.engine = opened
                    return opened
        return shard.engine

    def open_shards(self) -> list[Shard]:
        """Collections that have been used since the start."""
        return [shard for shard in self._shards.values() if shard.engine is not None]

    @property
    def config(self) -> VectorsConfig:
        """The store's configuration."""
        return self._config

    @property
    def files(self) -> CollectionFiles:
        """The store's files."""
        return self._files


def _made(folder: Path) -> str:
    folder.mkdir()
    return str(folder)
