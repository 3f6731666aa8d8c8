"""What every ObjectStore does."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from services.runtime.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
)
from services.storage.domain import PutOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.storage.domain import ObjectStore, StoredObject

BIG = bytes(range(256)) * 4096 * 3 + b"tail"  # 3 MiB and a bit: several blocks, the last one partial


async def pieces(content: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def put(store: ObjectStore, key: str, content: bytes = b"x", **options: object) -> StoredObject:
    return await store.put("box", key, pieces(content), PutOptions(**options))  # type: ignore[arg-type]  # a test's shorthand


async def read(store: ObjectStore, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
    _, content = await store.get("box", key, offset=offset, length=length)
    return b"".join([piece async for piece in content])


class ObjectStoreContract:
    """Subclasses give a fixture `store` that holds one empty bucket, `box`."""

    async def test_content_and_attributes_come_back(self, store: ObjectStore) -> None:
        written = await put(store, "a/b", BIG, content_type="text/x", metadata={"k": "v"})
        assert await read(store, "a/b") == BIG
        assert await store.head("box", "a/b") == written
        assert (written.size, written.content_type, written.metadata) == (len(BIG), "text/x", {"k": "v"})
        assert written.sha256 == hashlib.sha256(BIG).hexdigest()

    async def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        await put(store, "empty", b"")
        assert await read(store, "empty") == b""
        assert (await store.head("box", "empty")).size == 0

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (5, 10), (262_143, 2), (262_144, 262_144), (1_000_000, None), (len(BIG) - 1, 99)],
    )
    async def test_a_range_is_exactly_that_part(
        self, store: ObjectStore, offset: int, length: int | None
    ) -> None:
        await put(store, "big", BIG)
        end = None if length is None else offset + length
        assert await read(store, "big", offset=offset, length=length) == BIG[offset:end]

    async def test_a_range_beyond_the_end_is_refused(self, store: ObjectStore) -> None:
        await put(store, "big", BIG)
        with pytest.raises(OutOfRangeError):
            await read(store, "big", offset=len(BIG))

    @pytest.mark.parametrize(
        "key", ["../../etc/passwd", "%2e%2e/x", "a", "a/b", ".", "ünï/コード", "k" * 1024]
    )
    async def test_any_text_is_a_key(self, store: ObjectStore, key: str) -> None:
        await put(store, key, key.encode())
        assert await read(store, key) == key.encode()

    @pytest.mark.parametrize("key", ["", "a\0b", "k" * 2000, "é" * 513])
    async def test_malformed_keys_name_the_field(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await put(store, key)
        assert caught.value.violations[0].field == "key"

    @pytest.mark.parametrize("name", ["", "ab", "A-b", "a_b", "-ab", "ab-", "a" * 64, "a/b"])
    async def test_malformed_bucket_names_are_refused(self, store: ObjectStore, name: str) -> None:
        with pytest.raises(InvalidArgumentError):
            await store.create_bucket(name)

    async def test_replacing_changes_content_and_etag(self, store: ObjectStore) -> None:
        first = await put(store, "k", b"one")
        second = await put(store, "k", b"two")
        assert first.etag != second.etag
        assert await read(store, "k") == b"two"

    async def test_a_reader_of_a_replaced_object_gets_one_of_them_whole(self, store: ObjectStore) -> None:
        await put(store, "k", BIG)
        _, content = await store.get("box", "k")
        head = await anext(aiter(content))
        await put(store, "k", b"new")
        assert head + b"".join([piece async for piece in content]) == BIG

    async def test_a_wrong_digest_changes_nothing(self, store: ObjectStore) -> None:
        await put(store, "k", b"good")
        with pytest.raises(InvalidArgumentError):
            await put(store, "k", b"bad", sha256=hashlib.sha256(b"other").hexdigest())
        assert await read(store, "k") == b"good"

    async def test_conditions_decide_which_writer_wins(self, store: ObjectStore) -> None:
        first = await put(store, "k", b"one", if_absent=True)
        with pytest.raises(AbortedError):
            await put(store, "k", b"two", if_absent=True)
        await put(store, "k", b"three", if_match=first.etag)
        with pytest.raises(AbortedError):
            await put(store, "k", b"four", if_match=first.etag)
        assert await read(store, "k") == b"three"

    async def test_a_failed_upload_leaves_the_old_object(self, store: ObjectStore) -> None:
        await put(store, "k", b"old")

        async def breaks() -> AsyncIterator[bytes]:
            yield b"half"
            raise ConnectionError

        with pytest.raises(ConnectionError):
            await store.put("box", "k", breaks(), PutOptions())
        assert await read(store, "k") == b"old"

    async def test_missing_things_are_not_found(self, store: ObjectStore) -> None:
        with pytest.raises(NotFoundError):
            await store.head("box", "nothing")
        with pytest.raises(NotFoundError):
            await store.get("nobox", "k")
        with pytest.raises(NotFoundError):
            await store.put("nobox", "k", pieces(b"x"), PutOptions())
        with pytest.raises(NotFoundError):
            await store.list_objects("nobox", prefix="", delimiter="", limit=1, position=None)

    async def test_delete_counts_what_existed(self, store: ObjectStore) -> None:
        await put(store, "a")
        await put(store, "b")
        assert await store.delete("box", ["a", "b", "c"]) == 2
        with pytest.raises(NotFoundError):
            await store.head("box", "a")

    async def test_a_bucket_with_objects_goes_only_by_force(self, store: ObjectStore) -> None:
        await put(store, "a")
        with pytest.raises(FailedPreconditionError):
            await store.delete_bucket("box")
        await store.delete_bucket("box", force=True)
        with pytest.raises(NotFoundError):
            await store.get_bucket("box")

    async def test_buckets_are_listed_in_order(self, store: ObjectStore) -> None:
        await store.create_bucket("abc")
        with pytest.raises(AlreadyExistsError):
            await store.create_bucket("abc")
        assert [bucket.name for bucket in await store.list_buckets(limit=10)] == ["abc", "box"]
        assert [bucket.name for bucket in await store.list_buckets(limit=10, after="abc")] == ["box"]

    @pytest.mark.parametrize("limit", [1, 2, 3, 100])
    async def test_pages_together_are_the_whole_listing(self, store: ObjectStore, limit: int) -> None:
        keys = ["a", "b/1", "b/2", "b/3", "b0", "c/x/1", "c/x/2", "c/y", "z", "é/1"]
        for key in keys:
            await put(store, key)
        flat = await self._all(store, limit, prefix="", delimiter="")
        assert flat == (keys, [])
        assert await self._all(store, limit, prefix="b/", delimiter="") == (["b/1", "b/2", "b/3"], [])
        assert await self._all(store, limit, prefix="", delimiter="/") == (
            ["a", "b0", "z"],
            ["b/", "c/", "é/"],
        )
        assert await self._all(store, limit, prefix="c/", delimiter="/") == (["c/y"], ["c/x/"])

    async def _all(
        self, store: ObjectStore, limit: int, *, prefix: str, delimiter: str
    ) -> tuple[list[str], list[str]]:
        objects: list[str] = []
        prefixes: list[str] = []
        position: bytes | None = None
        while True:
            page = await store.list_objects(
                "box", prefix=prefix, delimiter=delimiter, limit=limit, position=position
            )
            assert len(page.objects) + len(page.prefixes) <= limit
            objects += [entry.key for entry in page.objects]
            prefixes += page.prefixes
            position = page.next_position
            if position is None:
                return objects, prefixes

    async def test_reads_and_deletes_may_ask_for_an_etag(self, store: ObjectStore) -> None:
        first = await put(store, "k", b"one")
        second = await put(store, "k", b"two")
        with pytest.raises(AbortedError):
            await store.get("box", "k", if_match=first.etag)
        with pytest.raises(AbortedError):
            await store.delete("box", ["k"], if_match=first.etag)
        with pytest.raises(AbortedError):
            await store.delete("box", ["gone"], if_match=first.etag)
        _, content = await store.get("box", "k", if_match=second.etag)
        assert b"".join([piece async for piece in content]) == b"two"
        assert await store.delete("box", ["k"], if_match=second.etag) == 1
