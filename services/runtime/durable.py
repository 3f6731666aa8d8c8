"""Files and folders that are there as a whole or not at all, also after a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def sync(path: Path | str) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, text: str) -> None:
    """Write or replace a small file at once."""
    fresh = file.with_name(f"{file.name}.new")
    with fresh.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
    sync(file.parent)


class Folders:
    """Folders of one kind of thing, each made complete before it appears and gone before it is emptied."""

    def __init__(self, root: Path, prefix: str) -> None:
        """Set the place.

        Args:
            root: Made if it does not exist.
            prefix: Begins the names of complete folders; a name's digest follows, so any name will do.
        """
        self.root = root
        self._prefix = prefix
        root.mkdir(parents=True, exist_ok=True)

    def load(self) -> list[Path]:
        """All complete folders; what a crash left half made or half deleted is removed."""
        found = []
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(("new-", "trash-")):
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.name.startswith(self._prefix):
                found.append(folder)
        return found

    def path(self, name: str) -> Path:
        """Where the folder of a name is, or will be."""
        return self.root / f"{self._prefix}{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    def create(self, name: str, fill: Callable[[Path], None]) -> None:
        """Make a name's folder appear, complete; `fill` writes into the empty folder it is given."""
        folder = self.root / f"new-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            fill(folder)
            folder.rename(self.path(name))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync(self.root)

    def remove(self, folder: Path) -> Path:
        """Make a folder vanish; return where it lies until it is discarded."""
        trash = self.root / f"trash-{uuid.uuid4().hex}"
        folder.rename(trash)
        sync(self.root)
        return trash


def discard(folder: Path) -> None:
    """Remove a folder that nothing refers to any more."""
    shutil.rmtree(folder, ignore_errors=True)
