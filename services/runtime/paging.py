"""Pages of a listing (google.aip.dev/158): sizes are clamped, tokens bound to their listing."""

from __future__ import annotations

import base64
import binascii
import hashlib

from services.runtime.errors import InvalidArgumentError

_SCOPE_BYTES = 8


def page_size(asked: int, *, default: int = 100, maximum: int = 1000, field: str = "page_size") -> int:
    """The size to use: the default for 0, at most the maximum.

    Raises:
        InvalidArgumentError: A negative size.
    """
    if asked < 0:
        raise InvalidArgumentError("must not be negative", field=field)
    return min(asked or default, maximum)


def _digest(scope: tuple[str, ...]) -> bytes:
    return hashlib.sha256("\0".join(scope).encode()).digest()[:_SCOPE_BYTES]


def encode_token(position: bytes, *scope: str) -> str:
    """A token for the page after `position` of the listing that `scope` names (method and filters)."""
    return base64.urlsafe_b64encode(_digest(scope) + position).decode()


def decode_token(token: str, *scope: str) -> bytes | None:
    """The position of a token, or None for the first page.

    Raises:
        InvalidArgumentError: The token is damaged or of another listing.
    """
    if not token:
        return None
    try:
        content = base64.urlsafe_b64decode(token.encode())
    except (binascii.Error, ValueError):
        content = b""
    if content[:_SCOPE_BYTES] != _digest(scope):
        raise InvalidArgumentError(
            "not a token of this listing", field="page_token", reason="INVALID_PAGE_TOKEN"
        )
    return content[_SCOPE_BYTES:]
