"""Programs in other languages that the tests bring into the mesh, each built once a machine."""

from __future__ import annotations

import hashlib
import shutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.servers.programs import GO_BUILD, Program

_HERE = Path(__file__).resolve().parent
_CLIENTS = _HERE.parents[1] / "clients"


@dataclass(frozen=True, slots=True)
class Caller(Program):
    """A client of the mesh: `call` with the target after it, as in go/main.go.

    Attributes:
        sources: What it is built from; the names and bytes of the files are its version.
    """

    sources: ClassVar[tuple[Path, ...]]

    @property
    def version(self) -> str:
        """A hash of its sources."""
        digest = hashlib.sha256()
        for source in self.sources:
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def needs(self) -> str:
        """What would provide it."""
        return f"needs {' and '.join(self.tools)} on PATH, then `make servers`"

    @abstractmethod
    def command(self, target: str) -> list[str | Path]:
        """How to start it in the folder of the built program."""


@dataclass(frozen=True, slots=True)
class GoCaller(Caller):
    """Built from a module with a go.sum."""

    tools = ("go",)
    sources = (_HERE / "go",)

    def make(self, folder: Path) -> Path:
        """Build it."""
        made = folder / "made"
        made.mkdir()
        self.run(*GO_BUILD, "-o", made / "program", ".", folder=self.sources[0])
        return made

    def command(self, target: str) -> list[str | Path]:
        """How to start it."""
        return [self.cached / "program", "call", target]


POLYGLOT: dict[str, Caller] = {
    program.name.removeprefix("polyglot-"): program
    for program in (GoCaller("polyglot-go", "a minute or two"),)
}
"""The programs by language."""


def copied(source: Path, folder: Path) -> Path:
    """A copy of a source folder, so that a build leaves nothing in the checkout."""
    return shutil.copytree(source, folder / source.name)
