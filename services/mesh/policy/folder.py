"""Policies in folders of YAML files, watched."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import structlog

from services.mesh.policy.domain import MAX_BYTES, Document
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

log = structlog.get_logger(__name__)

_SUFFIX = ".yaml"

Stamps = dict[str, tuple[str, int, int, int]]


class FolderPolicyStore:
    """One file a service: those shipped or kept by the user, and over them those written here."""

    def __init__(self, base: Path, written: Path, *, interval_s: float = 0.5) -> None:
        """Name the folders; they need not exist.

        Args:
            base: Read only.
            written: Where `write` puts files. A file here hides the one of the same name in `base`.
            interval_s: How often the folders are looked at.
        """
        self._base = base
        self._written = written
        self._interval_s = interval_s
        self._wake = asyncio.Event()

    async def read(self) -> dict[str, Document]:
        """See PolicyStore."""
        return await asyncio.to_thread(self._read, self._stamps())

    async def write(self, documents: Mapping[str, str], *, remove: frozenset[str] = frozenset()) -> None:
        """See PolicyStore."""
        try:
            await asyncio.to_thread(self._write, documents, remove)
        except OSError as error:
            raise FailedPreconditionError(
                f"policies cannot be written: {error.strerror}", reason="POLICIES_READ_ONLY"
            ) from error
        self._wake.set()

    async def watch(self) -> AsyncIterator[dict[str, Document]]:
        """See PolicyStore."""
        seen: Stamps | None = None
        while True:
            self._wake.clear()
            stamps = self._stamps()
            if stamps != seen:
                seen = stamps
                yield await asyncio.to_thread(self._read, stamps)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), self._interval_s)
            except TimeoutError:
                continue

    def _stamps(self) -> Stamps:
        """What tells one state of the files from another, without reading them."""
        found: Stamps = {}
        for folder in (self._base, self._written):
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.endswith(_SUFFIX):
                            status = entry.stat()
                            stamp = (entry.path, status.st_mtime_ns, status.st_ino, status.st_size)
                            found[entry.name.removesuffix(_SUFFIX)] = stamp
            except OSError:
                continue  # not there: no policies of their own; a file vanished: the next look sees
        return found

    def _read(self, stamps: Stamps) -> dict[str, Document]:
        documents = {}
        for service, (path, *_) in sorted(stamps.items()):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - scandir gave text
                    text = file.read(MAX_BYTES + 1)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                # Not the same as removed: it is refused below, and what was read of it before stays.
                log.warning("file_unreadable", path=path, error=error.strerror)
                text = ""
            documents[service] = Document(path, text)
        return documents

    def _write(self, documents: Mapping[str, str], remove: frozenset[str]) -> None:
        self._written.mkdir(parents=True, exist_ok=True, mode=0o700)
        # First all temporary files: a full disk then changes nothing.
        temporaries = []
        for service, text in documents.items():
            temporary = self._written / f".{service}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporaries.append((temporary, self._written / f"{service}{_SUFFIX}"))
        for temporary, path in temporaries:
            temporary.replace(path)
        for service in remove:
            (self._written / f"{service}{_SUFFIX}").unlink(missing_ok=True)
