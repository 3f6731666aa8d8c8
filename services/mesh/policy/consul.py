"""Policies in Consul's key-value store: one key a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.mesh.consul.kv import MAX_OPERATIONS
from services.mesh.policy.domain import Document
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.mesh.consul.kv import KeyValues

PREFIX = "plexus/policies/"


class ConsulPolicyStore:
    """Documents under a prefix; they change all together or not at all."""

    def __init__(self, keys: KeyValues, prefix: str = PREFIX) -> None:
        self._keys = keys
        self._prefix = prefix

    async def read(self) -> dict[str, Document]:
        """See PolicyStore."""
        entries = await self._keys.all(self._prefix)
        return self._documents({key: entry.value for key, entry in entries.items()})

    async def write(self, documents: Mapping[str, str], *, remove: frozenset[str] = frozenset()) -> None:
        """See PolicyStore."""
        gone = {self._prefix + service for service in remove}
        if gone:
            gone &= (await self._keys.all(self._prefix)).keys()
        if len(documents) + len(gone) > MAX_OPERATIONS:
            raise InvalidArgumentError(
                f"Consul changes at most {MAX_OPERATIONS} keys at once: apply the policies in parts"
            )
        texts = {self._prefix + service: text.encode() for service, text in documents.items()}
        await self._keys.replace(texts, gone)

    async def watch(self) -> AsyncIterator[dict[str, Document]]:
        """See PolicyStore."""
        async for values in self._keys.watch(self._prefix):
            yield self._documents(values)

    def _documents(self, values: Mapping[str, bytes]) -> dict[str, Document]:
        return {
            key.removeprefix(self._prefix): Document(key, value.decode("utf-8", "replace"))
            for key, value in sorted(values.items())
            if key != self._prefix  # a folder made in Consul's UI
        }
