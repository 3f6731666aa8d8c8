"""Objects as HTTP knows them (RFC 9110): ranges, conditions, validators, and labels as X-Meta-* headers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from services.runtime.errors import AbortedError, InvalidArgumentError, NotFoundError, OutOfRangeError
from services.runtime.pipeline import HTTP_STATUS_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.runtime.request import Rest
    from services.storage.domain import ObjectStore, PutOptions, StoredObject

LABEL_PREFIX = "x-meta-"
LENGTH_KEY = "x-http-content-length"
"""Metadata that the edge makes Content-Length of; gRPC does not let a handler set that name."""
_ATTEMPTS = 5
_TOKEN = re.compile(r"[a-z0-9_.-]+")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.IGNORECASE)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')
_SAFE_IN_HEADER = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@dataclass(frozen=True, slots=True)
class Part:
    """What of an object is sent: offset and length in bytes, length 0 with `body` unset for none at all."""

    status: HTTPStatus
    offset: int
    length: int
    body: bool = True


def _etag(stored: StoredObject) -> str:
    return f'"{stored.etag}"'


def _matches(header: str, stored: StoredObject) -> bool:
    """Whether one of the listed entity tags is the object's; a weak one never is."""
    return header.strip() == "*" or _etag(stored) in _ETAG.findall(header)


def _date(headers: Mapping[str, str], name: str) -> datetime | None:
    """The date of a header; None without one. A malformed date counts as none (RFC 9110, 13.1.3)."""
    try:
        date = parsedate_to_datetime(headers[name])
    except (KeyError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _modified(stored: StoredObject) -> datetime:
    return stored.updated.replace(microsecond=0)  # HTTP dates have whole seconds


def _failed(stored: StoredObject | None) -> AbortedError:
    text = "there is no such object" if stored is None else "the object has changed"
    return AbortedError(f"the request's condition does not hold: {text}", reason="CONDITION_FAILED")


def choose(headers: Mapping[str, str], stored: StoredObject) -> Part:
    """What a GET with these headers gets of an object, in the order of RFC 9110, 13.2.2.

    Raises:
        AbortedError: If-Match or If-Unmodified-Since does not hold.
        OutOfRangeError: No byte of the object lies in the range.
    """
    since = _date(headers, "if-unmodified-since")
    if "if-match" in headers:
        if not _matches(headers["if-match"], stored):
            raise _failed(stored)
    elif since is not None and _modified(stored) > since:
        raise _failed(stored)
    since = _date(headers, "if-modified-since")
    if "if-none-match" in headers:
        unchanged = _matches(headers["if-none-match"], stored)
    else:
        unchanged = since is not None and _modified(stored) <= since
    if unchanged:
        return Part(HTTPStatus.NOT_MODIFIED, 0, 0, body=False)
    whole = Part(HTTPStatus.OK, 0, stored.size)
    # Several ranges at once, and units other than bytes, may be ignored (14.2).
    asked = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if asked is None or asked.groups() == ("", "") or not _same_as_before(headers, stored):
        return whole
    first, last = asked.groups()
    if not first:
        offset, end = max(0, stored.size - int(last)), stored.size
    else:
        offset, end = int(first), min(stored.size, int(last) + 1) if last else stored.size
        if last and int(last) < offset:
            return whole  # not a range at all (14.1.1)
    if offset >= stored.size or offset >= end:
        raise OutOfRangeError(
            f"the object has {stored.size} bytes",
            reason="RANGE_BEYOND_END",
            metadata={"size": str(stored.size)},
        )
    return Part(HTTPStatus.PARTIAL_CONTENT, offset, end - offset)


def _same_as_before(headers: Mapping[str, str], stored: StoredObject) -> bool:
    """Whether If-Range, if there is one, means this very content: by strong tag or exact date."""
    condition = headers.get("if-range", "").strip()
    if not condition:
        return True
    if condition.endswith('"'):
        return condition == _etag(stored)
    return _date(headers, "if-range") == _modified(stored)


def response_headers(stored: StoredObject, part: Part) -> list[tuple[str, str]]:
    """Initial metadata that the edge turns into status and headers of the answer."""
    headers = [
        (HTTP_STATUS_KEY, str(part.status.value)),
        ("etag", _etag(stored)),
        ("last-modified", format_datetime(_modified(stored), usegmt=True)),
        ("accept-ranges", "bytes"),
        ("x-content-type-options", "nosniff"),
    ]
    if part.status is not HTTPStatus.NOT_MODIFIED:
        headers.append((LENGTH_KEY, str(part.length)))
    if part.status is HTTPStatus.PARTIAL_CONTENT:
        last = part.offset + part.length - 1
        headers.append(("content-range", f"bytes {part.offset}-{last}/{stored.size}"))
    for name, value in stored.metadata.items():
        if _TOKEN.fullmatch(name):  # others are shown by HeadObject alone
            headers.append((LABEL_PREFIX + name, quote(value, safe=_SAFE_IN_HEADER)))
    return headers


async def read(
    store: ObjectStore, rest: Rest, bucket: str, key: str, *, offset: int, length: int
) -> tuple[StoredObject, Part, AsyncIterator[bytes]]:
    """An object, what of it answers the request, and that content.

    Args:
        store: Where it is.
        rest: The HTTP request.
        bucket: Its bucket.
        key: Its key.
        offset: From the query, first byte.
        length: From the query, number of bytes; 0 for all that follow.

    Raises:
        InvalidArgumentError: A range both in the header and in the query.
        AbortedError: A condition does not hold, or writers replace the object faster than it can be opened.
        OutOfRangeError: The range is beyond the end.
    """
    if (offset or length) and "range" in rest.headers:
        raise InvalidArgumentError("give a range as header or as offset and length, not both", field="offset")
    for attempt in range(_ATTEMPTS):
        stored = await store.head(bucket, key)
        part = choose(rest.headers, stored)
        if part.body and (offset or length):
            part = replace(
                part, offset=offset, length=max(0, min(length or stored.size, stored.size - offset))
            )
        if rest.method == "HEAD":
            part = replace(part, body=False)
        if not part.body:
            return stored, part, _nothing()
        try:
            _, content = await store.get(
                bucket, key, offset=part.offset, length=part.length, if_match=stored.etag
            )
        except AbortedError:  # replaced since: look again
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        return stored, part, content
    raise AssertionError  # the last attempt returned or raised


async def _nothing() -> AsyncIterator[bytes]:
    empty: tuple[bytes, ...] = ()
    for piece in empty:
        yield piece


async def write_options(
    store: ObjectStore, rest: Rest, bucket: str, key: str, given: PutOptions
) -> PutOptions:
    """Options of a PUT: those of the query, with conditions and labels from the headers.

    Raises:
        InvalidArgumentError: The content is encoded; it would be stored without that mark.
        AbortedError: A condition does not hold.
    """
    if rest.headers.get("content-encoding", "identity") != "identity":
        raise InvalidArgumentError(
            "send the content as it is to be read: Content-Encoding is not kept",
            field="content-encoding",
            reason="UNSUPPORTED_CONTENT_ENCODING",
        )
    labels = {
        name.removeprefix(LABEL_PREFIX): unquote(value)
        for name, value in rest.headers.items()
        if name.startswith(LABEL_PREFIX)
    }
    options = replace(given, metadata={**given.metadata, **labels})
    if not _CONDITIONS.isdisjoint(rest.headers):
        etag = await _present(store, rest.headers, bucket, key)
        options = replace(options, if_match=etag, if_absent=not etag)
    return options


async def delete_condition(store: ObjectStore, rest: Rest, bucket: str, key: str) -> str:
    """The etag that a DELETE with conditions is for; empty without conditions.

    Raises:
        AbortedError: A condition does not hold.
    """
    if _CONDITIONS.isdisjoint(rest.headers):
        return ""
    return await _present(store, rest.headers, bucket, key)


_CONDITIONS = frozenset({"if-match", "if-none-match", "if-unmodified-since"})


async def _present(store: ObjectStore, headers: Mapping[str, str], bucket: str, key: str) -> str:
    """The etag of the object, empty if there is none, after its conditions were checked.

    A write under that etag then holds what was seen here to be still so.
    """
    stored: StoredObject | None
    try:
        stored = await store.head(bucket, key)
    except NotFoundError as error:
        if error.reason != "OBJECT_NOT_FOUND":
            raise
        stored = None
    since = _date(headers, "if-unmodified-since")
    if "if-match" in headers:
        holds = stored is not None and _matches(headers["if-match"], stored)
    else:
        holds = since is None or (stored is not None and _modified(stored) <= since)
    if stored is not None and _matches(headers.get("if-none-match", ""), stored):
        holds = False
    if not holds:
        raise _failed(stored)
    return "" if stored is None else stored.etag
