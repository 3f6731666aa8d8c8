"""Consul's key-value store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from services.mesh.consul.kv import MAX_OPERATIONS, MAX_VALUE_BYTES, KeyValues
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.mesh.consul.client import ConsulClient

PREFIX = "plexus/policies/"
EVERY_BYTE = bytes(range(256))


@pytest.fixture
def store(client: ConsulClient) -> KeyValues:
    return KeyValues(client)


async def test_a_value_comes_back_byte_for_byte(store: KeyValues) -> None:
    assert await store.get("plexus/a") is None
    for value in (EVERY_BYTE, b"", b"x" * MAX_VALUE_BYTES):
        assert await store.put("plexus/a", value)
        entry = await store.get("plexus/a")
        assert entry is not None
        assert entry.value == value


async def test_too_long_a_value_is_refused_by_its_field(store: KeyValues) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await store.put("plexus/a", b"x" * (MAX_VALUE_BYTES + 1))
    assert caught.value.violations[0].field == "value"


async def test_compare_and_set_lets_one_writer_win(store: KeyValues) -> None:
    results = await asyncio.gather(*(store.put("plexus/a", str(n).encode(), cas=0) for n in range(8)))
    assert sorted(results) == [False] * 7 + [True]
    entry = await store.get("plexus/a")
    assert entry is not None
    assert not await store.put("plexus/a", b"late", cas=entry.index - 1)
    assert not await store.delete("plexus/a", cas=entry.index - 1)
    assert await store.put("plexus/a", b"next", cas=entry.index)
    assert await store.get("plexus/a") != entry


async def test_a_set_of_keys_changes_at_once_or_not_at_all(store: KeyValues) -> None:
    await store.put("plexus/old", b"1")
    await store.replace({"plexus/a": b"1", "plexus/b": EVERY_BYTE}, ["plexus/old"])
    assert {key: entry.value for key, entry in (await store.all("plexus/")).items()} == {
        "plexus/a": b"1",
        "plexus/b": EVERY_BYTE,
    }
    with pytest.raises(InvalidArgumentError):
        await store.replace({"plexus/c": b"1", "": b"no key"})
    with pytest.raises(InvalidArgumentError):
        await store.replace({f"plexus/{n}": b"" for n in range(MAX_OPERATIONS + 1)})
    assert sorted(await store.all("plexus/")) == ["plexus/a", "plexus/b"]


async def test_a_watch_tells_the_present_each_change_and_the_end_of_the_last_key(store: KeyValues) -> None:
    watch = store.watch(PREFIX)
    async with asyncio.timeout(60):
        assert await anext(watch) == {}
        await store.put(PREFIX + "vectors", b"1")
        assert await anext(watch) == {PREFIX + "vectors": b"1"}
        await store.put("elsewhere", b"1")
        await store.put(PREFIX + "vectors", b"1")  # no change
        await store.replace({PREFIX + "vectors": b"2", PREFIX + "search": b"3"})
        assert await anext(watch) == {PREFIX + "search": b"3", PREFIX + "vectors": b"2"}
        await store.replace({}, [PREFIX + "vectors", PREFIX + "search"])
        assert await anext(watch) == {}
    await watch.aclose()  # type: ignore[attr-defined]  # it is a generator
