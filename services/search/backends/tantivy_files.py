"""Where the embedded engine keeps its indexes, and how they appear and vanish in one step.

    <root>/i-<hash>/index.json   what the index is
    <root>/i-<hash>/data/        the engine's files
    <root>/new-<random>/         an index being made; removed at the next start
    <root>/trash-<random>/       an index being deleted; removed at the next start

The rename of a folder is the moment of creation and of deletion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from services.runtime.durable import Folders, write_durably
from services.runtime.errors import DataLossError
from services.search.domain import Analyzer, Field, FieldType, IndexSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_DESCRIPTION = "index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """An index on disk: its folder, what it was created as, when, and by which request."""

    folder: Path
    spec: IndexSpec
    created_at: datetime
    request_id: str

    @property
    def data_folder(self) -> Path:
        """Folder of the engine's files."""
        return self.folder / "data"


def _write_description(stored: Stored, folder: Path) -> None:
    fields = [
        {"name": entry.name, "type": entry.type, "analyzer": entry.analyzer} for entry in stored.spec.fields
    ]
    text = json.dumps(
        {
            "name": stored.spec.name,
            "fields": fields,
            "created_at": stored.created_at.isoformat(),
            "request_id": stored.request_id,
        }
    )
    write_durably(folder / _DESCRIPTION, text)


def _read_description(folder: Path) -> Stored:
    try:
        content: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
        fields = tuple(
            Field(entry["name"], FieldType(entry["type"]), Analyzer(entry["analyzer"]))
            for entry in content["fields"]
        )
        return Stored(
            folder=folder,
            spec=IndexSpec(content["name"], fields),
            created_at=datetime.fromisoformat(content["created_at"]),
            request_id=content["request_id"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"the description of index folder {folder.name} is damaged") from error


class IndexFiles:
    """The folders of all indexes."""

    def __init__(self, root: Path) -> None:
        self._folders = Folders(root, "i-")
        self.root = root

    def load(self) -> list[Stored]:
        """All indexes; what a crash left half made or half deleted is removed.

        Raises:
            DataLossError: A description cannot be read.
        """
        return [_read_description(folder) for folder in self._folders.load()]

    def create(self, spec: IndexSpec, request_id: str, fill: Callable[[Path], None]) -> Stored:
        """Make an index's folder appear, complete.

        Args:
            spec: What it is.
            request_id: Of the creation.
            fill: Writes the engine's files into the empty folder it is given.
        """
        stored = Stored(self._folders.path(spec.name), spec, datetime.now(UTC), request_id)

        def complete(folder: Path) -> None:
            data = folder / stored.data_folder.name
            data.mkdir()
            fill(data)
            _write_description(stored, folder)

        self._folders.create(spec.name, complete)
        return stored

    def remove(self, stored: Stored) -> Path:
        """Make an index's folder vanish; return where it lies until it is discarded."""
        return self._folders.remove(stored.folder)
