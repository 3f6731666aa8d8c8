"""What every PolicyStore does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.policy.domain import Document, PolicyStore


def texts(documents: dict[str, Document]) -> dict[str, str]:
    return {service: document.text for service, document in documents.items()}


async def until(watch: AsyncIterator[dict[str, Document]], wanted: dict[str, str]) -> None:
    async with asyncio.timeout(60):
        async for documents in watch:
            if texts(documents) == wanted:
                return
    raise AssertionError("the watch ended")


class PolicyStoreContract:
    """Subclasses give a fixture `store`: an empty one."""

    async def test_an_empty_store_has_no_documents(self, store: PolicyStore) -> None:
        assert await store.read() == {}

    async def test_what_was_written_is_read_as_it_was(self, store: PolicyStore) -> None:
        text = "# Grüße\nservice: a\n"
        await store.write({"a": text, "b": "not: judged: here"})
        assert texts(await store.read()) == {"a": text, "b": "not: judged: here"}

    async def test_every_document_has_an_origin_to_point_to(self, store: PolicyStore) -> None:
        await store.write({"a": "service: a"})
        assert "a" in (await store.read())["a"].origin

    async def test_writing_replaces_and_removing_an_unknown_one_is_no_error(self, store: PolicyStore) -> None:
        await store.write({"a": "1", "b": "2"})
        await store.write({"a": "3"}, remove=frozenset({"b", "c"}))
        assert texts(await store.read()) == {"a": "3"}

    async def test_a_watch_tells_the_present_and_each_change(self, store: PolicyStore) -> None:
        await store.write({"a": "1"})
        watch = store.watch()
        await until(watch, {"a": "1"})
        await store.write({"b": "2"})
        await until(watch, {"a": "1", "b": "2"})
        await store.write({}, remove=frozenset({"a"}))
        await until(watch, {"b": "2"})

    async def test_two_watches_are_told_both(self, store: PolicyStore) -> None:
        first, second = store.watch(), store.watch()
        await until(first, {})
        await until(second, {})
        await store.write({"a": "1"})
        await until(first, {"a": "1"})
        await until(second, {"a": "1"})
