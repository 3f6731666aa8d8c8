"""The embedded store: its contract, crashes, damage and a full disk."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from services.runtime.errors import DataLossError, ResourceExhaustedError
from services.storage.backends.local import LocalObjectStore
from services.storage.domain import PutOptions
from tests.contracts.object_store import BIG, ObjectStoreContract, pieces, put, read
from tests.disk import small_disk
from tests.killed import killed_writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalObjectStore]:
    async with LocalObjectStore(tmp_path) as store:
        await store.create_bucket("box")
        yield store


class TestLocalObjectStore(ObjectStoreContract):
    pass


def _contents(folder: Path) -> list[Path]:
    return sorted((folder / "blobs").glob("??/*"))


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async with LocalObjectStore(tmp_path) as store:
        await store.create_bucket("box")
        await put(store, "k", BIG)
    async with LocalObjectStore(tmp_path) as store:
        assert await read(store, "k") == BIG


async def test_damage_is_told_before_any_damaged_byte(store: LocalObjectStore, tmp_path: Path) -> None:
    await put(store, "k", BIG)
    (content,) = _contents(tmp_path)
    with content.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\xff\x00\xff")
    received = bytearray()

    async def download() -> None:
        _, parts = await store.get("box", "k")
        async for part in parts:
            received.extend(part)

    with pytest.raises(DataLossError):
        await download()
    assert bytes(received) == BIG[: len(received)]
    assert await read(store, "k", length=1000) == BIG[:1000]


async def test_replaced_deleted_and_abandoned_contents_leave_no_files(
    store: LocalObjectStore, tmp_path: Path
) -> None:
    await put(store, "k", b"one")
    await put(store, "k", b"two")
    assert len(_contents(tmp_path)) == 1
    await store.delete("box", ["k"])
    assert _contents(tmp_path) == []
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"half"
        started.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(store.put("box", "k", endless(), PutOptions()))
    await started.wait()
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    await store.list_buckets(limit=1)  # the removal is queued before this in the index thread
    assert _contents(tmp_path) == []


async def test_an_object_over_the_bound_is_refused(tmp_path: Path) -> None:
    async with LocalObjectStore(tmp_path, max_object_bytes=10) as store:
        await store.create_bucket("box")
        with pytest.raises(ResourceExhaustedError):
            await put(store, "k", b"12345678901")


_WRITER = """
import asyncio, sys
from pathlib import Path
from services.storage.backends.local import LocalObjectStore
from services.storage.domain import PutOptions

async def main():
    async with LocalObjectStore(Path(sys.argv[1])) as store:
        number = 0
        while True:
            number += 1
            async def content():
                for _ in range(4):
                    yield f"{number:08d}".encode() * 50_000
            await store.put("box", "k", content(), PutOptions())
            print(number, flush=True)

asyncio.run(main())
"""


async def test_kill_at_any_moment_leaves_the_acknowledged_or_the_next_object_whole(tmp_path: Path) -> None:
    async with LocalObjectStore(tmp_path) as store:
        await store.create_bucket("box")
    for acknowledgements in (1, 3, 7):
        last = int((await asyncio.to_thread(killed_writer, _WRITER, tmp_path, acknowledgements))[-1])
        async with LocalObjectStore(tmp_path) as store:
            content = await read(store, "k")
            number = int(content[:8])
            assert content == f"{number:08d}".encode() * 200_000
            assert number in (last, last + 1)
            assert len(_contents(tmp_path)) == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", size_mib=2) as folder:
        yield folder


async def test_a_full_disk_refuses_writes_and_goes_on_reading(disk: Path) -> None:
    async with LocalObjectStore(disk) as store:
        await store.create_bucket("box")
        await put(store, "kept", b"k" * 300_000)
        with pytest.raises(ResourceExhaustedError) as caught:
            await store.put("box", "big", pieces(BIG), PutOptions())
        assert caught.value.reason == "DISK_FULL"
        assert await read(store, "kept") == b"k" * 300_000
        await store.delete("box", ["kept"])
        await put(store, "small", b"s" * 300_000)
