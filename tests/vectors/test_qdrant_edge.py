"""The embedded vector store: its contract, crashes, and optimisation while it is written to."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

import pytest

from services.runtime.errors import DataLossError, ResourceExhaustedError
from services.vectors.backends.qdrant_edge import QdrantEdgeStore
from services.vectors.backends.qdrant_optimizer import Optimizer
from services.vectors.config import VectorsConfig
from services.vectors.domain import CollectionSpec, Distance, Filter, Point, Query, Range, Selection
from tests.contracts.vectors import DOCS, VectorStoreContract, point
from tests.killed import killed_writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.vectors.domain import VectorStore

WRITER = """
import asyncio, sys
from pathlib import Path
from services.vectors.backends.qdrant_edge import QdrantEdgeStore
from services.vectors.config import VectorsConfig
from services.vectors.domain import CollectionSpec, Distance, Filter, Match, Point

async def main():
    config = VectorsConfig(flush_after_points=700)
    async with QdrantEdgeStore.open(Path(sys.argv[1]), config) as store:
        await store.create_collection(CollectionSpec("docs", 8, Distance.DOT))
        number = 0
        while True:
            batch = [Point(f"p{number + i}", [float(number + i)] * 8, {"n": number + i}) for i in range(50)]
            await store.upsert("docs", batch)
            await store.delete_matching("docs", Filter(must=(Match("n", (number,)),)))
            number += 50
            print(number, flush=True)

asyncio.run(main())
"""


class TestQdrantEdgeStore(VectorStoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[VectorStore]:
        async with QdrantEdgeStore.open(tmp_path) as store:
            yield store


@pytest.mark.parametrize("lines", [3, 40])
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, lines: int) -> None:
    last = int((await asyncio.to_thread(killed_writer, WRITER, tmp_path, lines))[-1])
    async with QdrantEdgeStore.open(tmp_path) as store:
        kept = await store.points("docs", [f"p{number}" for number in range(last)], Selection(vector=True))
        assert [found.payload["n"] for found in kept] == [number for number in range(last) if number % 50]
        assert all(list(found.vector or ()) == [found.payload["n"]] * 8 for found in kept)
        # At most one batch that was stored and not yet told.
        assert await store.count("docs", Filter(must=(Range("n", gte=last),))) <= 50


async def test_a_reopened_store_has_everything(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path) as store:
        made = await store.create_collection(DOCS, request_id="r")
        await store.create_collection(CollectionSpec("gone", 2))
        await store.delete_collection("gone")
        await store.upsert("docs", [point(1), point(2)])
        await store.delete("docs", ["p1"])
    async with QdrantEdgeStore.open(tmp_path) as store:
        assert [found.spec.name for found in await store.collections(limit=9)] == ["docs"]
        assert (await store.create_collection(DOCS, request_id="r")).created_at == made.created_at
        assert await store.count("docs", Filter()) == 1


async def test_what_a_crash_left_half_made_or_half_deleted_is_cleared(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path) as store:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(1)])
    root = tmp_path / "collections"
    (folder,) = root.iterdir()
    for left in (root / "new-1", root / "trash-2", folder / "shard-7"):
        left.mkdir()
    async with QdrantEdgeStore.open(tmp_path) as store:
        assert await store.count("docs", Filter()) == 1
    assert [entry.name for entry in root.iterdir()] == [folder.name]
    assert not (folder / "shard-7").exists()


def _damage(folder: Path) -> None:
    (file,) = folder.glob("collections/*/collection.json")
    file.write_text("{")


async def test_a_damaged_description_stops_the_start(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path) as store:
        await store.create_collection(DOCS)
    _damage(tmp_path)
    with pytest.raises(DataLossError):
        async with QdrantEdgeStore.open(tmp_path):
            pass


async def test_a_full_disk_refuses_writes_and_still_reads_and_deletes_collections(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path) as store:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(1)])
    async with QdrantEdgeStore.open(tmp_path, VectorsConfig(min_free_disk_bytes=2**62)) as store:
        with pytest.raises(ResourceExhaustedError) as caught:
            await store.upsert("docs", [point(2)])
        assert caught.value.reason == "DISK_FULL"
        with pytest.raises(ResourceExhaustedError):
            await store.create_collection(CollectionSpec("more", 2))
        assert await store.count("docs", Filter()) == 1
        await store.delete_collection("docs")


async def test_too_many_collections_are_refused(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path, VectorsConfig(max_collections=1)) as store:
        await store.create_collection(DOCS)
        with pytest.raises(ResourceExhaustedError) as caught:
            await store.create_collection(CollectionSpec("more", 2))
        assert caught.value.reason == "TOO_MANY_COLLECTIONS"


def _wave(number: int) -> list[float]:
    return [((number * step) % 101) / 101 for step in range(1, 65)]


async def test_optimising_keeps_what_is_written_meanwhile(tmp_path: Path) -> None:
    spec = CollectionSpec("docs", 64, Distance.DOT)
    async with QdrantEdgeStore.open(tmp_path) as store:
        await store.create_collection(spec)
        for start in range(0, 3000, 500):
            batch = [Point(f"p{n}", array("f", _wave(n)), {"n": n}) for n in range(start, start + 500)]
            await store.upsert("docs", batch)
        (shard,) = store.open_shards()
        before = shard.stored.shard_folder
        optimisation = asyncio.create_task(Optimizer(store).optimize(shard))
        number = 3000
        while not optimisation.done():
            await store.upsert("docs", [Point(f"p{number}", array("f", _wave(number)), {"n": number})])
            await store.delete("docs", [f"p{number - 3000}"])
            assert await store.search("docs", Query(array("f", _wave(7)), limit=1))
            number += 1
        assert await optimisation
        assert shard.stored.shard_folder != before
        assert not before.exists()
        await _check_numbers(store, number)
        assert number > 3000
    async with QdrantEdgeStore.open(tmp_path) as store:
        await _check_numbers(store, number)
        # And the optimised shard takes further writes.
        await store.upsert("docs", [Point("p0", array("f", _wave(0)), {})])


async def _check_numbers(store: QdrantEdgeStore, number: int) -> None:
    assert await store.count("docs", Filter()) == 3000
    ids = [f"p{n}" for n in range(number)]
    kept = {found.payload["n"] for found in await store.points("docs", ids, Selection())}
    assert kept == set(range(number - 3000, number))


async def test_deleting_a_collection_that_is_being_optimised(tmp_path: Path) -> None:
    async with QdrantEdgeStore.open(tmp_path) as store:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(number) for number in range(100)])
        (shard,) = store.open_shards()
        optimisation = asyncio.create_task(Optimizer(store).optimize(shard))
        while shard.journal is None:
            await store.count("docs", Filter())
        await store.delete_collection("docs")
        assert not await optimisation
        await store.create_collection(DOCS)
        assert await store.count("docs", Filter()) == 0
    async with QdrantEdgeStore.open(tmp_path) as store:
        assert [found.spec for found in await store.collections(limit=2)] == [DOCS]
