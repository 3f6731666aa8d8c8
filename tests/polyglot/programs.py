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
_MADE = frozenset({"node_modules", "target"})


@dataclass(frozen=True, slots=True)
class Caller(Program):
    """A client of the mesh: calls the method that a line of stdin names, and prints a JSON line for each.

    Attributes:
        sources: What it is built from; the names and bytes of the files are its version.
        in_doubt: Code and text of what its library says of a call that a dying connection took with it, and
            that no retry policy of xDS reaches.
        sets_aside: Whether it is sent outlier detection.
    """

    sources: ClassVar[tuple[Path, ...]]
    in_doubt: ClassVar[tuple[str, str]] = ("", "")
    sets_aside: ClassVar[bool] = True

    @property
    def version(self) -> str:
        """A hash of its sources."""
        digest = hashlib.sha256()
        for source in self.sources:
            for path in sorted(
                path for path in source.rglob("*") if path.is_file() and not _MADE & set(path.parts)
            ):
                digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def needs(self) -> str:
        """What would provide it."""
        return f"needs {' and '.join(self.tools)} on PATH, then `make servers`"

    @abstractmethod
    def command(self, target: str) -> list[str | Path]:
        """How to start it, in the folder of the built program."""


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


@dataclass(frozen=True, slots=True)
class GoPubsub(GoCaller):
    """Google Pub/Sub's client, which is no caller of the mesh: it runs scenarios."""

    sources = (_HERE / "pubsub",)


@dataclass(frozen=True, slots=True)
class NodeCaller(Caller):
    """Installed from a package-lock.json, with the package of clients/node."""

    tools = ("node", "npm")
    sources = (_HERE / "node", _CLIENTS / "node")

    def make(self, folder: Path) -> Path:
        """Build it."""
        made, _ = (_copied(source, folder) for source in self.sources)
        self.run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", folder=made)
        return made

    def command(self, target: str) -> list[str | Path]:
        """How to start it."""
        return ["node", "--require", "plexus-mesh-preload", "caller.js", target]


@dataclass(frozen=True, slots=True)
class JavaCaller(Caller):
    """Compiled against clients/java and what that depends on, whose versions its pom.xml fixes."""

    tools = ("java", "javac", "mvn")
    sources = (_HERE / "java", _CLIENTS / "java")
    in_doubt = ("UNKNOWN", "channel closed")
    sets_aside = False

    def make(self, folder: Path) -> Path:
        """Build it."""
        source, client = (_copied(source, folder) for source in self.sources)
        made = folder / "made"
        library = made / "lib"
        collect = ("dependency:copy-dependencies", f"-DoutputDirectory={library}", "-DincludeScope=runtime")
        self.run("mvn", "-B", "-q", "-Dstyle.color=never", "package", *collect, folder=client)
        for jar in (client / "target").glob("*.jar"):
            shutil.copy(jar, library)
        self.run("javac", "-cp", f"{library}/*", "-d", made, source / "Caller.java", folder=folder)
        return made

    def command(self, target: str) -> list[str | Path]:
        """How to start it."""
        # A test makes few calls: start quickly rather than run fast.
        quick = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m")
        return ["java", *quick, "-cp", f"{self.cached}:{self.cached}/lib/*", "Caller", target]


POLYGLOT: dict[str, Caller] = {
    program.name.removeprefix("polyglot-"): program
    for program in (
        GoCaller("polyglot-go", "a minute or two"),
        NodeCaller("polyglot-node", "half a minute"),
        JavaCaller("polyglot-java", "half a minute"),
    )
}
"""The programs by language."""
PUBSUB = GoPubsub("polyglot-pubsub", "two minutes")
"""Google Pub/Sub's client for Go."""


def _copied(source: Path, folder: Path) -> Path:
    """A copy at the same path as in the checkout, so that a build leaves nothing there."""
    copy = folder / source.relative_to(_CLIENTS.parent)
    return Path(shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*_MADE)))
