"""Contents on the local disk: a file each, named by a random id, durable once written, checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zlib
from typing import IO, TYPE_CHECKING

import structlog

from services.runtime.durable import sync
from services.runtime.errors import DataLossError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = structlog.get_logger(__name__)

BLOCK = 256 * 1024
"""Unit of reading, writing and checking, in bytes."""


class Blobs:
    """The folder of contents. Its methods block: call them from a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _path(self, blob: str) -> Path:
        return self._folder / blob[:2] / blob

    def create(self) -> Upload:
        """A new, empty content."""
        blob = uuid.uuid4().hex
        path = self._path(blob)
        try:
            path.parent.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            sync(self._folder)  # else a crash may lose the new folder with what is durable in it
        return Upload(blob, path)

    def open(self, blob: str) -> IO[bytes]:
        """Open a content.

        Raises:
            FileNotFoundError: There is none, or no longer.
        """
        return self._path(blob).open("rb")

    def remove(self, blobs: Iterable[str]) -> None:
        """Remove contents; those that do not exist are no error."""
        for blob in blobs:
            self._path(blob).unlink(missing_ok=True)

    def sweep(self, named: set[str]) -> None:
        """Remove what no row names: uploads that a crash cut off."""
        orphans = [path for path in self._folder.glob("??/*") if path.name not in named]
        for path in orphans:
            path.unlink()
        if orphans:
            log.info("unreferenced_contents_removed", count=len(orphans))


def read_block(file: IO[bytes], checks: bytes, number: int) -> bytes:
    """One block of a content; `checks` holds the CRC-32 of each, 4 bytes little-endian.

    Raises:
        DataLossError: The block is not what was written.
    """
    file.seek(number * BLOCK)
    data = file.read(BLOCK)
    if zlib.crc32(data).to_bytes(4, "little") != checks[number * 4 : number * 4 + 4]:
        raise DataLossError("the object's content is damaged", reason="CONTENT_DAMAGED")
    return data


class Upload:
    """A content being written: file, digest, and a CRC-32 of each block to check ranges by."""

    def __init__(self, blob: str, path: Path) -> None:
        self.blob = blob
        self._path = path
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._pending = bytearray()
        self.size = 0
        self.committed = False
        self.checks = bytearray()

    def write(self, piece: bytes) -> None:
        """Append content."""
        self.size += len(piece)
        self._pending += piece
        while len(self._pending) >= BLOCK:
            self._flush(bytes(self._pending[:BLOCK]))
            del self._pending[:BLOCK]

    def _flush(self, block: bytes) -> None:
        self._file.write(block)
        self._digest.update(block)
        self.checks += zlib.crc32(block).to_bytes(4, "little")

    def finish(self) -> None:
        """Flush content and name to the disk."""
        if self._pending:
            self._flush(bytes(self._pending))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sync(self._path.parent)

    @property
    def sha256(self) -> str:
        """Digest of what was written, hexadecimal."""
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Remove the file unless a row names it."""
        if self.committed:
            return
        with contextlib.suppress(
            OSError
        ):  # a full disk may refuse the last flush; the name goes all the same
            self._file.close()
        self._path.unlink(missing_ok=True)
