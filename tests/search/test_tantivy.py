"""The embedded search engine: its contract, crashes, and the memory of its writers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from services.runtime.errors import DataLossError, ResourceExhaustedError
from services.search.backends.tantivy import TantivyIndex
from services.search.config import SearchConfig
from services.search.domain import Filter, IndexSpec, Query, Range
from tests.contracts.search import PAGES, SearchIndexContract, page
from tests.killed import killed_writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.search.domain import SearchIndex

WRITER = """
import asyncio, sys
from pathlib import Path
from services.search.backends.tantivy import TantivyIndex
from services.search.domain import Document, Field, FieldType, Filter, HasId, IndexSpec, Query

async def main():
    async with TantivyIndex.open(Path(sys.argv[1])) as index:
        await index.create_index(IndexSpec("pages", (Field("size", FieldType.INTEGER),)))
        number = 0
        while True:
            batch = [Document(f"d{number + i}", {"size": number + i}) for i in range(20)]
            await index.add("pages", batch)
            await index.delete("pages", Query(filter=Filter(must=(HasId((f"d{number}",)),))))
            number += 20
            print(number, flush=True)

asyncio.run(main())
"""


class TestTantivyIndex(SearchIndexContract):
    @pytest.fixture
    async def index(self, tmp_path: Path) -> AsyncIterator[SearchIndex]:
        async with TantivyIndex.open(tmp_path) as index:
            yield index


@pytest.mark.parametrize("lines", [2, 15])
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, lines: int) -> None:
    last = int((await asyncio.to_thread(killed_writer, WRITER, tmp_path, lines))[-1])
    async with TantivyIndex.open(tmp_path) as index:
        results = await index.search("pages", Query(limit=10_000))
        kept = {int(hit.document.fields["size"]) for hit in results.hits}
        assert {number for number in kept if number < last} == {n for n in range(last) if n % 20}
        # At most one batch that was stored and not yet told.
        assert len({number for number in kept if number >= last}) <= 20
        # The dead process's lock does not keep the next writer out.
        await index.add("pages", [page(0)])


async def test_a_reopened_index_has_everything(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        made = await index.create_index(PAGES, request_id="r")
        await index.create_index(IndexSpec("gone", PAGES.fields))
        await index.delete_index("gone")
        await index.add("pages", [page(1, title="kept"), page(2)])
    async with TantivyIndex.open(tmp_path) as index:
        assert [found.spec.name for found in await index.indexes(limit=9)] == ["pages"]
        assert (await index.create_index(PAGES, request_id="r")).created_at == made.created_at
        assert (await index.document("pages", "d1")).fields == {"size": 1, "title": "kept"}


async def test_what_a_crash_left_half_made_or_half_deleted_is_cleared(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        await index.create_index(PAGES)
    root = tmp_path / "indexes"
    before = set(root.iterdir())
    for left in (root / "new-1", root / "trash-2"):
        left.mkdir()
    async with TantivyIndex.open(tmp_path) as index:
        assert [found.spec for found in await index.indexes(limit=9)] == [PAGES]
    assert set(root.iterdir()) == before


def _damage(folder: Path) -> None:
    (file,) = folder.glob("indexes/*/index.json")
    file.write_text("{")


async def test_a_damaged_description_stops_the_start(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        await index.create_index(PAGES)
    _damage(tmp_path)
    with pytest.raises(DataLossError):
        async with TantivyIndex.open(tmp_path):
            pass


async def test_a_full_disk_refuses_documents_and_still_finds_and_deletes(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        await index.create_index(PAGES)
        await index.add("pages", [page(1), page(2)])
    async with TantivyIndex.open(tmp_path, SearchConfig(min_free_disk_bytes=2**62)) as index:
        for refused in (index.add("pages", [page(3)]), index.create_index(IndexSpec("x", PAGES.fields))):
            with pytest.raises(ResourceExhaustedError) as caught:
                await refused
            assert caught.value.reason == "DISK_FULL"
        assert await index.delete("pages", Query(filter=Filter(must=(Range("size", 2),)))) == 1
        assert (await index.search("pages", Query())).total_count == 1


async def test_too_many_indexes_are_refused(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path, SearchConfig(max_indexes=1)) as index:
        await index.create_index(PAGES)
        with pytest.raises(ResourceExhaustedError) as caught:
            await index.create_index(IndexSpec("more", PAGES.fields))
        assert caught.value.reason == "TOO_MANY_INDEXES"


def _writers(index: TantivyIndex) -> set[str]:
    return {name for name, entry in index._indexes.items() if entry.has_writer}


async def test_writers_exist_only_while_they_are_used_and_only_a_few(tmp_path: Path) -> None:
    config = SearchConfig(max_open_writers=2, writer_idle_s=0)
    async with TantivyIndex.open(tmp_path, config) as index:
        for name in "abc":
            await index.create_index(IndexSpec(name, PAGES.fields))
        assert _writers(index) == set()
        for name in "abcab":
            await index.add(name, [page(1)])
        assert _writers(index) == {"a", "b"}
        await index.close_idle_writers()
        assert _writers(index) == set()
        await index.add("c", [page(2)])
        assert [found.document_count for found in await index.indexes(limit=3)] == [1, 1, 2]


async def test_writes_of_many_callers_share_commits(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        await index.create_index(PAGES)
        commits = 0
        entry = index._indexes["pages"]
        commit = entry.commit

        def counted() -> None:
            nonlocal commits
            commits += 1
            commit()

        entry.commit = counted  # type: ignore[method-assign]  # counts, and commits as before
        await asyncio.gather(*(index.add("pages", [page(number)]) for number in range(100)))
        assert (await index.index("pages")).document_count == 100
        assert commits <= 10
