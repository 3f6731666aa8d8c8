"""Consul's key-value store: exact bytes, compare-and-set, sets of keys changed at once, and watches."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.mesh.consul.answers import listing, mapping
from services.mesh.consul.watch import changes
from services.runtime.errors import DataLossError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from services.mesh.consul.answers import Answer
    from services.mesh.consul.client import ConsulClient

MAX_VALUE_BYTES = 512 * 1024
"""Consul's bound on a value."""
MAX_OPERATIONS = 128
"""Consul's bound on a transaction."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and the index of its last change, for compare-and-set."""

    value: bytes
    index: int


class KeyValues:
    """The key-value store of a Consul."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client

    async def get(self, key: str) -> Entry | None:
        """The entry of a key, if there is one.

        Raises:
            PermissionDeniedError: The token may not read it.
            UnavailableError: Consul does not answer.
        """
        _, found = await self._client.api.kv.get(key)
        return None if found is None else Entry(found["Value"] or b"", found["ModifyIndex"])

    async def put(self, key: str, value: bytes, *, cas: int | None = None) -> bool:
        """Set a key.

        Args:
            key: Without a leading slash.
            value: At most 512 KiB.
            cas: Set it only if the key's index still is this; 0: only if there is no such key.

        Returns:
            False if the comparison failed.

        Raises:
            InvalidArgumentError: The value is too long.
            PlexusError: As `get`.
        """
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidArgumentError(f"at most {MAX_VALUE_BYTES} bytes", field="value")
        return bool(await self._client.api.kv.put(key, value, cas=cas))

    async def delete(self, key: str, *, cas: int | None = None) -> bool:
        """Remove a key; one that does not exist is no error. `cas` and the result as of `put`."""
        return bool(await self._client.api.kv.delete(key, cas=cas))

    async def all(self, prefix: str) -> dict[str, Entry]:
        """Every entry whose key begins with the prefix, by whole key."""
        answer = await self._client.request("GET", f"/v1/kv/{prefix}", [("recurse", "true")])
        return _entries(answer)

    async def replace(self, put: Mapping[str, bytes], delete: Iterable[str] = ()) -> None:
        """Set and remove several keys: all of them or, on any error, none.

        Raises:
            InvalidArgumentError: More than 128 operations, or Consul refuses one.
            PlexusError: As `get`.
        """
        operations: list[dict[str, Any]] = [
            {"KV": {"Verb": "set", "Key": key, "Value": base64.b64encode(value).decode()}}
            for key, value in put.items()
        ]
        operations += [{"KV": {"Verb": "delete", "Key": key}} for key in delete]
        if len(operations) > MAX_OPERATIONS:
            raise InvalidArgumentError(f"at most {MAX_OPERATIONS} keys at once", field="put")
        if operations:
            await self._client.put("/v1/txn", operations)

    async def watch(self, prefix: str) -> AsyncIterator[dict[str, bytes]]:
        """The values under a prefix by whole key, now and after each change.

        While Consul does not answer, or hides the keys because the token lost its rights, nothing is told:
        the last mapping holds.
        """
        path = f"/v1/kv/{prefix}"

        async def believe(answer: Answer) -> bool:
            _entries(answer)
            return not answer.filtered

        async for answer in changes(self._client, path, ("recurse", "true"), believe=believe):
            yield {key: entry.value for key, entry in _entries(answer).items()}


def _entries(answer: Answer) -> dict[str, Entry]:
    entries = {}
    for item in listing(answer.json(), "key list"):
        fields = mapping(item, "key")
        try:
            value = base64.b64decode(fields["Value"] or "", validate=True)
            entries[str(fields["Key"])] = Entry(value, int(fields["ModifyIndex"]))
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise DataLossError("Consul's key list is malformed", reason="CONSUL_ANSWER_INVALID") from error
    return entries
