"""Buckets and objects, and what any store of them does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

MAX_KEY_BYTES = 1024
MAX_METADATA_ENTRIES = 64
MAX_METADATA_BYTES = 8 * 1024
DEFAULT_CONTENT_TYPE = "application/octet-stream"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Bucket:
    """A namespace of objects."""

    name: str
    created: datetime


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What is known of an object; `size` in bytes, `sha256` lower-case hexadecimal."""

    bucket: str
    key: str
    size: int
    content_type: str
    metadata: dict[str, str]
    sha256: str
    etag: str
    updated: datetime


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How an object is to be written.

    Attributes:
        content_type: Media type.
        metadata: Labels.
        sha256: The digest that the content must have; empty: not checked.
        if_match: Write only over this etag; empty: any.
        if_absent: Write only where there is nothing.
    """

    content_type: str = DEFAULT_CONTENT_TYPE
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    if_match: str = ""
    if_absent: bool = False

    def __post_init__(self) -> None:
        size = sum(len(key.encode()) + len(value.encode()) for key, value in self.metadata.items())
        if len(self.metadata) > MAX_METADATA_ENTRIES or size > MAX_METADATA_BYTES:
            raise InvalidArgumentError(
                f"at most {MAX_METADATA_ENTRIES} entries and {MAX_METADATA_BYTES} bytes", field="metadata"
            )
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise InvalidArgumentError("must be 64 hexadecimal digits", field="sha256")


@dataclass(frozen=True, slots=True)
class Listing:
    """A page: objects and common prefixes in byte order, and where the next page starts."""

    objects: list[StoredObject]
    prefixes: list[str]
    next_position: bytes | None


def check_bucket(name: str) -> str:
    """Return a valid bucket name.

    Raises:
        InvalidArgumentError: It is not one.
    """
    if not _BUCKET.fullmatch(name):
        raise InvalidArgumentError(
            "must be 3 to 63 lower-case letters, digits, dots and hyphens", field="bucket"
        )
    return name


def check_key(key: str) -> str:
    """Return a valid key.

    Raises:
        InvalidArgumentError: It is empty, over 1,024 bytes, or contains NUL.
    """
    if not key or len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidArgumentError(f"must be 1 to {MAX_KEY_BYTES} bytes of UTF-8", field="key")
    if "\0" in key:
        raise InvalidArgumentError("must not contain NUL", field="key")
    return key


class ObjectStore(Protocol):
    """Objects in buckets; every write is durable when its call returns."""

    async def create_bucket(self, name: str) -> Bucket:
        """Create a bucket.

        Raises:
            AlreadyExistsError: There is one of this name.
        """
        ...

    async def get_bucket(self, name: str) -> Bucket:
        """Get a bucket.

        Raises:
            NotFoundError: There is none.
        """
        ...

    async def list_buckets(self, *, limit: int, after: str = "") -> list[Bucket]:
        """Buckets in order of names, after one of them."""
        ...

    async def delete_bucket(self, name: str, *, force: bool = False) -> None:
        """Delete a bucket, with its objects if forced.

        Raises:
            NotFoundError: There is none.
            FailedPreconditionError: It holds objects and `force` is not set.
        """
        ...

    async def put(
        self, bucket: str, key: str, content: AsyncIterator[bytes], options: PutOptions
    ) -> StoredObject:
        """Store an object, replacing one of the same key as a whole or not at all.

        Raises:
            NotFoundError: No such bucket.
            InvalidArgumentError: The content does not have the given digest.
            AbortedError: The condition does not hold.
            ResourceExhaustedError: The disk is full or the object too large; nothing has changed.
        """
        ...

    async def head(self, bucket: str, key: str) -> StoredObject:
        """What is known of an object.

        Raises:
            NotFoundError: No such bucket or key.
        """
        ...

    async def get(
        self, bucket: str, key: str, *, offset: int = 0, length: int | None = None, if_match: str = ""
    ) -> tuple[StoredObject, AsyncIterator[bytes]]:
        """An object and its content in pieces, or a range of it, cut at the end.

        Raises:
            NotFoundError: No such bucket or key.
            AbortedError: The object has another etag than `if_match`; empty: any.
            OutOfRangeError: The range begins beyond the end.
            DataLossError: From the iterator, before any damaged byte.
        """
        ...

    async def list_objects(
        self, bucket: str, *, prefix: str, delimiter: str, limit: int, position: bytes | None
    ) -> Listing:
        """A page of a bucket.

        Raises:
            NotFoundError: No such bucket.
        """
        ...

    async def delete(self, bucket: str, keys: Sequence[str], *, if_match: str = "") -> int:
        """Delete keys and tell how many existed; if an etag is given, only if each has it.

        Raises:
            NotFoundError: No such bucket.
            AbortedError: An object has another etag, or there is none; nothing is deleted.
        """
        ...
