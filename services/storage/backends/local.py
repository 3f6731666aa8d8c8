"""Objects on the local disk: keys are rows of a SQLite index, contents are files named by a random id.

A write puts the content into a new file, flushes it to the disk, then commits the row; the row is the moment
of truth. A crash before it leaves a file that nobody names, removed at the next start. Files, not obstore's
local store, hold the contents since that one does not flush before it reports success.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

from services.runtime.database import connect, transaction
from services.runtime.disk import disk_errors
from services.runtime.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from services.storage.backends.local_blobs import BLOCK, Blobs, Upload, read_block
from services.storage.domain import Bucket, Listing, PutOptions, StoredObject, check_bucket, check_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path
    from types import TracebackType

_THREADS = 4
_ABOVE_ANY_KEY = b"\xff"  # a byte that UTF-8 never contains

_MIGRATIONS = (
    """
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS objects (
    bucket TEXT NOT NULL REFERENCES buckets (name),
    key BLOB NOT NULL,
    blob TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    content_type TEXT NOT NULL,
    metadata TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    checks BLOB NOT NULL,
    etag TEXT NOT NULL,
    updated REAL NOT NULL,
    PRIMARY KEY (bucket, key)
) WITHOUT ROWID;
""",
)
_COLUMNS = "bucket, key, size, content_type, metadata, sha256, etag, updated"

T = TypeVar("T")


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _object(row: tuple[Any, ...]) -> StoredObject:
    bucket, key, size, content_type, metadata, sha256, etag, updated = row
    return StoredObject(
        bucket, key.decode(), size, content_type, json.loads(metadata), sha256, etag, _time(updated)
    )


def _check(if_match: str, row: tuple[Any, ...] | None, key: str) -> None:
    """Refuse unless the row, whose first column is the etag, is the one that was asked for; empty: any."""
    if if_match and (row is None or row[0] != if_match):
        raise AbortedError("the object has changed", reason="CONDITION_FAILED", metadata={"key": key})


class LocalObjectStore:
    """The embedded ObjectStore; open it with `async with`."""

    def __init__(self, folder: Path, *, max_object_bytes: int = 5 * 1024**3) -> None:
        """Open the index.

        Args:
            folder: Where everything is kept; made if need be.
            max_object_bytes: Largest object taken.
        """
        self._blobs = Blobs(folder / "blobs")
        self._max_object_bytes = max_object_bytes
        # One thread owns the connection: SQLite writes one at a time anyway, and reads of the index take less
        # than a millisecond. Contents are read and written by the pool.
        self._index_thread = ThreadPoolExecutor(1, "storage-index")
        self._pool = ThreadPoolExecutor(_THREADS, "storage-files")
        self._db = connect(folder / "index.sqlite", _MIGRATIONS)

    async def __aenter__(self) -> Self:
        """Remove what a crash left behind."""
        await self._index(self._sweep)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is being written and close."""
        self._pool.shutdown(wait=True)
        self._index_thread.shutdown(wait=True)
        self._db.close()

    async def _index(self, work: Callable[..., T], *args: Any) -> T:
        with disk_errors():
            return await asyncio.get_running_loop().run_in_executor(self._index_thread, work, *args)

    async def _file(self, work: Callable[..., T], *args: Any) -> T:
        with disk_errors():
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def _sweep(self) -> None:
        self._blobs.sweep({row[0] for row in self._db.execute("SELECT blob FROM objects")})

    # Buckets.

    async def create_bucket(self, name: str) -> Bucket:
        """See ObjectStore."""
        check_bucket(name)

        def work() -> Bucket:
            created = datetime.now(UTC).timestamp()
            try:
                self._db.execute("INSERT INTO buckets VALUES (?, ?)", (name, created))
            except sqlite3.IntegrityError as error:
                raise AlreadyExistsError(
                    f"bucket {name!r} exists", reason="BUCKET_EXISTS", metadata={"bucket": name}
                ) from error
            return Bucket(name, _time(created))

        return await self._index(work)

    def _bucket(self, name: str) -> Bucket:
        row = self._db.execute("SELECT name, created FROM buckets WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFoundError(f"no bucket {name!r}", reason="BUCKET_NOT_FOUND", metadata={"bucket": name})
        return Bucket(row[0], _time(row[1]))

    async def get_bucket(self, name: str) -> Bucket:
        """See ObjectStore."""
        return await self._index(self._bucket, name)

    async def list_buckets(self, *, limit: int, after: str = "") -> list[Bucket]:
        """See ObjectStore."""

        def work() -> list[Bucket]:
            rows = self._db.execute(
                "SELECT name, created FROM buckets WHERE name > ? ORDER BY name LIMIT ?", (after, limit)
            )
            return [Bucket(name, _time(created)) for name, created in rows]

        return await self._index(work)

    async def delete_bucket(self, name: str, *, force: bool = False) -> None:
        """See ObjectStore."""

        def work() -> list[str]:
            with transaction(self._db):
                self._bucket(name)
                rows = self._db.execute("SELECT blob FROM objects WHERE bucket = ?", (name,)).fetchall()
                if rows and not force:
                    raise FailedPreconditionError(
                        f"bucket {name!r} is not empty", reason="BUCKET_NOT_EMPTY", metadata={"bucket": name}
                    )
                self._db.execute("DELETE FROM objects WHERE bucket = ?", (name,))
                self._db.execute("DELETE FROM buckets WHERE name = ?", (name,))
            return [row[0] for row in rows]

        await self._file(self._blobs.remove, await self._index(work))

    # Objects.

    async def put(
        self, bucket: str, key: str, content: AsyncIterator[bytes], options: PutOptions
    ) -> StoredObject:
        """See ObjectStore."""
        check_key(key)
        await self.get_bucket(bucket)
        upload = await self._file(self._blobs.create)
        try:
            async for piece in content:
                if upload.size + len(piece) > self._max_object_bytes:
                    raise ResourceExhaustedError(
                        f"an object may have at most {self._max_object_bytes} bytes",
                        reason="OBJECT_TOO_LARGE",
                    )
                await self._file(upload.write, piece)
            await self._file(upload.finish)
            if options.sha256 and options.sha256.lower() != upload.sha256:
                raise InvalidArgumentError(
                    "the content has another digest", field="sha256", reason="CHECKSUM_MISMATCH"
                )
            stored, replaced = await self._index(self._commit, bucket, key, upload, options)
        except BaseException:
            # A cancelled call may have its commit still to come in the index thread; queued behind it, the
            # removal sees what became of it. Not awaited: the error may be a cancellation.
            self._index_thread.submit(upload.abandon)
            raise
        if replaced is not None:
            await self._file(self._blobs.remove, [replaced])
        return stored

    def _commit(
        self, bucket: str, key: str, upload: Upload, options: PutOptions
    ) -> tuple[StoredObject, str | None]:
        raw = key.encode()
        with transaction(self._db):
            self._bucket(bucket)
            row = self._db.execute(
                "SELECT etag, blob FROM objects WHERE bucket = ? AND key = ?", (bucket, raw)
            ).fetchone()
            _check(options.if_match, row, key)
            if options.if_absent and row:
                raise AbortedError(
                    "there is such an object", reason="CONDITION_FAILED", metadata={"key": key}
                )
            updated = datetime.now(UTC).timestamp()
            self._db.execute(
                "INSERT OR REPLACE INTO objects (bucket, key, size, content_type, metadata, sha256, etag,"
                " updated, blob, checks) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(bucket, raw, upload.size, options.content_type, json.dumps(options.metadata)),
                    *(upload.sha256, upload.blob, updated, upload.blob, bytes(upload.checks)),
                ),
            )
        upload.committed = True
        stored = StoredObject(
            *(bucket, key, upload.size, options.content_type, dict(options.metadata)),
            *(upload.sha256, upload.blob, _time(updated)),
        )
        return stored, row[1] if row else None

    def _row(self, bucket: str, key: str) -> tuple[StoredObject, str, bytes]:
        self._bucket(bucket)
        row = self._db.execute(
            f"SELECT {_COLUMNS}, blob, checks FROM objects WHERE bucket = ? AND key = ?",  # noqa: S608 - constant
            (bucket, key.encode()),
        ).fetchone()
        if row is None:
            raise NotFoundError(
                "no such object", reason="OBJECT_NOT_FOUND", metadata={"bucket": bucket, "key": key}
            )
        return _object(row[:-2]), row[-2], row[-1]

    async def head(self, bucket: str, key: str) -> StoredObject:
        """See ObjectStore."""
        return (await self._index(self._row, bucket, check_key(key)))[0]

    async def get(
        self, bucket: str, key: str, *, offset: int = 0, length: int | None = None, if_match: str = ""
    ) -> tuple[StoredObject, AsyncIterator[bytes]]:
        """See ObjectStore."""
        check_key(key)
        while True:
            stored, blob, checks = await self._index(self._row, bucket, key)
            _check(if_match, (stored.etag,), key)
            if offset < 0 or (length is not None and length < 0):
                raise InvalidArgumentError("must not be negative", field="offset")
            if offset > stored.size or (offset == stored.size and offset > 0):
                raise OutOfRangeError(
                    f"the object has {stored.size} bytes",
                    reason="RANGE_BEYOND_END",
                    metadata={"size": str(stored.size)},
                )
            try:
                file = await self._file(self._blobs.open, blob)
            except FileNotFoundError:
                # Replaced between the row and the file: the next look finds the new one.
                if (await self._index(self._row, bucket, key))[1] != blob:
                    continue
                raise DataLossError("the object's content is missing", reason="CONTENT_MISSING") from None
            end = stored.size if length is None else min(stored.size, offset + length)
            return stored, self._read(file, checks, offset, end)

    async def _read(self, file: IO[bytes], checks: bytes, offset: int, end: int) -> AsyncIterator[bytes]:
        try:
            position = offset
            while position < end:
                number, skip = divmod(position, BLOCK)
                data = (await self._file(read_block, file, checks, number))[skip : skip + end - position]
                position += len(data)
                yield data
        finally:
            file.close()

    async def list_objects(
        self, bucket: str, *, prefix: str, delimiter: str, limit: int, position: bytes | None
    ) -> Listing:
        """See ObjectStore."""
        return await self._index(self._list, bucket, prefix.encode(), delimiter.encode(), limit, position)

    def _list(
        self, bucket: str, prefix: bytes, delimiter: bytes, limit: int, position: bytes | None
    ) -> Listing:
        self._bucket(bucket)
        listing = Listing([], [], None)
        # The position is exclusive; the prefix itself is a possible key, hence the inclusive first look.
        after, inclusive = (prefix, True) if position is None else (position, False)
        while len(listing.objects) + len(listing.prefixes) < limit:
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM objects WHERE bucket = ? AND key {'>=' if inclusive else '>'} ?"  # noqa: S608 - constants
                " AND key < ? ORDER BY key LIMIT ?",
                (bucket, after, prefix + _ABOVE_ANY_KEY, limit),
            ).fetchall()
            inclusive = False
            if not rows:
                return listing
            for row in rows:
                if len(listing.objects) + len(listing.prefixes) >= limit:
                    return Listing(listing.objects, listing.prefixes, after)
                cut = row[1].find(delimiter, len(prefix)) if delimiter else -1
                if cut < 0:
                    listing.objects.append(_object(row))
                    after = row[1]
                else:
                    common = row[1][: cut + len(delimiter)]
                    listing.prefixes.append(common.decode())
                    after = common + _ABOVE_ANY_KEY  # jump over all keys of this prefix
                    break
            else:
                if len(rows) < limit:
                    return listing
        more = self._db.execute(
            "SELECT 1 FROM objects WHERE bucket = ? AND key > ? AND key < ? LIMIT 1",
            (bucket, after, prefix + _ABOVE_ANY_KEY),
        ).fetchone()
        return Listing(listing.objects, listing.prefixes, after if more else None)

    async def delete(self, bucket: str, keys: Sequence[str], *, if_match: str = "") -> int:
        """See ObjectStore."""
        raw = [check_key(key).encode() for key in keys]

        def work() -> list[str]:
            with transaction(self._db):
                self._bucket(bucket)
                blobs = []
                for key in raw:
                    if if_match:
                        found = self._db.execute(
                            "SELECT etag FROM objects WHERE bucket = ? AND key = ?", (bucket, key)
                        ).fetchone()
                        _check(if_match, found, key.decode())
                    row = self._db.execute(
                        "DELETE FROM objects WHERE bucket = ? AND key = ? RETURNING blob", (bucket, key)
                    ).fetchone()
                    if row:
                        blobs.append(row[0])
            return blobs

        removed = await self._index(work)
        await self._file(self._blobs.remove, removed)
        return len(removed)
