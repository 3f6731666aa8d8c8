"""Requests that are no valid message get a typed error.

gRPC itself answers them without a reason: an unreadable one as INTERNAL, a too large one like an empty quota.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from services.runtime.errors import InvalidArgumentError, PlexusError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class _Undecoded:
    """Stands for a request that could not be decoded, until its call has a place to raise why."""

    def __init__(self, error: PlexusError) -> None:
        self.error = error


def decoding(deserialize: Callable[[bytes], Any] | None, max_bytes: int) -> Callable[[bytes], Any] | None:
    """A deserializer that keeps what is wrong with a message for `decoded` to raise."""
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        if len(data) > max_bytes:
            text = f"a message may have at most {max_bytes} bytes, this one has {len(data)}"
            return _Undecoded(ResourceExhaustedError(text, reason="MESSAGE_TOO_LARGE"))
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError):
            text = "the request is no valid message: not UTF-8, nested over 100 deep, or another encoding"
            return _Undecoded(InvalidArgumentError(text, reason="MALFORMED_MESSAGE"))

    return decode


def decoded(request: Any) -> Any:
    """The request, if it was decoded; else its error is raised."""
    if isinstance(request, _Undecoded):
        raise request.error
    return request


async def each_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The same for a stream of requests, one by one."""
    async for request in requests:
        yield decoded(request)
