"""Where the embedded store keeps its collections, and how they appear and vanish in one step.

    <root>/c-<hash>/collection.json   what the collection is, and which shard folder is the current one
    <root>/c-<hash>/shard-<n>/        the engine's files
    <root>/new-<random>/              a collection being made; removed at the next start
    <root>/trash-<random>/            a collection being deleted; removed at the next start

The rename of a folder is the moment of creation and of deletion; that of collection.json of a new shard.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from services.runtime.durable import Folders, discard, sync, write_durably
from services.runtime.errors import DataLossError
from services.vectors.domain import CollectionSpec, Distance, PayloadIndex, PayloadType

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_DESCRIPTION = "collection.json"
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A collection on disk.

    Attributes:
        folder: Its own.
        spec: What it was created as.
        created_at: When.
        request_id: Of the call that created it.
        shard: Number of the current shard folder.
    """

    folder: Path
    spec: CollectionSpec
    created_at: datetime
    request_id: str
    shard: int = 0

    @property
    def shard_folder(self) -> Path:
        """Folder of the current shard."""
        return self.folder / f"shard-{self.shard}"


def sync_log(shard_folder: Path) -> None:
    """Make the write-ahead log of a shard durable: fsync also writes what was changed through a map."""
    folder = shard_folder / "wal"
    for entry in os.scandir(folder):
        # The engine renames finished segments and prepares new ones meanwhile; both hold nothing unsynced.
        if entry.name.startswith("tmp-"):
            continue
        with suppress(FileNotFoundError):
            sync(entry.path)
    sync(folder)


def size_of(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk; the log's are mostly holes."""
    return sum(path.stat().st_blocks for path in folder.rglob("*")) * 512


def copy_sparse(source: str, target: str) -> str:
    """Copy a file with its holes."""
    with open(source, "rb") as reader, open(target, "wb") as writer:  # noqa: PTH123 - shutil gives strings
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(reader.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole to the end
                break
            end = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            reader.seek(start)
            writer.seek(start)
            while start < end:
                start += writer.write(reader.read(min(end - start, _COPY_BYTES)))
    return target


def sync_tree(folder: Path) -> None:
    """Make every file and folder below a folder durable."""
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):  # noqa: PTH118 - os.walk's strings
            sync(path)


def _write_description(stored: Stored, folder: Path) -> None:
    spec = stored.spec
    text = json.dumps(
        {
            "name": spec.name,
            "dimension": spec.dimension,
            "distance": spec.distance,
            "embedding_model": spec.embedding_model,
            "payload_indexes": {index.field: index.type for index in spec.payload_indexes},
            "created_at": stored.created_at.isoformat(),
            "request_id": stored.request_id,
            "shard": stored.shard,
        }
    )
    write_durably(folder / _DESCRIPTION, text)


def _read_description(folder: Path) -> Stored:
    try:
        fields: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
        return Stored(
            folder=folder,
            spec=CollectionSpec(
                name=fields["name"],
                dimension=fields["dimension"],
                distance=Distance(fields["distance"]),
                embedding_model=fields["embedding_model"],
                payload_indexes=tuple(
                    PayloadIndex(field, PayloadType(kind))
                    for field, kind in fields["payload_indexes"].items()
                ),
            ),
            created_at=datetime.fromisoformat(fields["created_at"]),
            request_id=fields["request_id"],
            shard=fields["shard"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"the description of collection folder {folder.name} is damaged") from error


class CollectionFiles:
    """The folders of all collections."""

    def __init__(self, root: Path) -> None:
        self._folders = Folders(root, "c-")
        self.root = root

    def load(self) -> list[Stored]:
        """All collections; what a crash left half made or half deleted is removed.

        Raises:
            DataLossError: A description cannot be read.
        """
        found = [_read_description(folder) for folder in self._folders.load()]
        for stored in found:
            for other in stored.folder.glob("shard-*"):
                if other != stored.shard_folder:
                    discard(other)
        return found

    def create(self, spec: CollectionSpec, request_id: str, fill: Callable[[Path], None]) -> Stored:
        """Make a collection's folder appear, complete.

        Args:
            spec: What it is.
            request_id: Of the creation.
            fill: Writes the first shard into the (missing) folder it is given.
        """
        stored = Stored(self._folders.path(spec.name), spec, datetime.now(UTC), request_id)

        def complete(folder: Path) -> None:
            fill(folder / stored.shard_folder.name)
            _write_description(stored, folder)

        self._folders.create(spec.name, complete)
        return stored

    def remove(self, stored: Stored) -> Path:
        """Make a collection's folder vanish; return where it lies until it is discarded."""
        return self._folders.remove(stored.folder)

    @staticmethod
    def use_shard(stored: Stored, shard: int) -> Stored:
        """Make another shard folder the current one."""
        changed = replace(stored, shard=shard)
        _write_description(changed, stored.folder)
        return changed
