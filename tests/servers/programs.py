"""Servers that tests run: where the program comes from.

In this order: a binary on PATH, the one in the project's cache, a build from the Go module pinned in
`go/<name>/`. The cache is outside the checkout and keyed by version, so a build is made once a machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import platformdirs
import pytest

_HERE = Path(__file__).resolve().parent
CACHE = platformdirs.user_cache_path("plexus") / "servers"
GO_BUILD = ("go", "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w")
BUILD_S = 3600
"""Longest build, in seconds; a minute or several on an idle machine of two cores."""


class UnavailableServerError(Exception):
    """The program is neither here nor can it be built; the text says what would provide it."""


@dataclass(frozen=True, slots=True)
class Program(ABC):
    """Something that is built once a machine.

    Attributes:
        name: Of the program.
        takes: Roughly how long a build takes.
        tools: Commands that a build runs.
    """

    name: str
    takes: str
    tools: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def version(self) -> str:
        """What is pinned; another one is another build."""

    @property
    @abstractmethod
    def needs(self) -> str:
        """What would provide it."""

    @abstractmethod
    def make(self, folder: Path) -> Path:
        """Build it in an empty folder that is removed afterwards.

        Returns:
            The product, a file or a folder, in there.

        Raises:
            UnavailableServerError: The build failed.
        """

    @property
    def cached(self) -> Path:
        """Where the product lies."""
        return CACHE / f"{self.name}-{self.version}" / self.name

    def find(self) -> Path | None:
        """The product, if it is here without building."""
        return self.cached if self.cached.exists() else None

    def provide(self) -> Path:
        """The product, built if need be; whoever comes meanwhile waits for the same build.

        Raises:
            UnavailableServerError: A tool is missing, or the build failed.
        """
        found = self.find()
        if found is not None:
            return found
        if any(shutil.which(tool) is None for tool in self.tools):
            raise UnavailableServerError(self.needs)
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        with (self.cached.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.cached.exists():
                text = f"building {self.name} {self.version}; {self.takes} on two cores"
                print(text, file=sys.stderr, flush=True)  # noqa: T201 - minutes of silence look like a hang
                with tempfile.TemporaryDirectory(dir=self.cached.parent) as folder:
                    self.make(Path(folder)).replace(self.cached)
        return self.cached

    def run(self, *command: str | Path, folder: Path) -> None:
        """Run a step of a build.

        Raises:
            UnavailableServerError: It failed.
        """
        nice = ("nice", "-n", "5") if shutil.which("nice") else ()
        done = subprocess.run(
            [*nice, *command],
            cwd=folder,
            timeout=BUILD_S,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != 0:
            reason = done.stdout.decode(errors="replace")[-2000:]
            raise UnavailableServerError(f"`make servers` could not build {self.name}:\n{reason}")


@dataclass(frozen=True, slots=True)
class GoProgram(Program):
    """A program that is built from a Go module.

    Attributes:
        package: What to build.
        module: Whose version in go.mod is the program's.
    """

    package: str
    module: str
    tools = ("go",)

    @property
    def folder(self) -> Path:
        """Where go.mod and go.sum are."""
        return _HERE / "go" / self.name

    @property
    def pinned(self) -> str:
        """The version of the module."""
        found = re.search(rf"{re.escape(self.module)} (v\S+)", (self.folder / "go.mod").read_text())
        if found is None:
            raise ValueError(f"{self.folder}/go.mod does not require {self.module}")
        return found[1]

    @property
    def version(self) -> str:
        """The same: the program is the module's."""
        return self.pinned

    @property
    def needs(self) -> str:
        """What would provide it."""
        return f"needs {self.name} on PATH, or Go and `make servers`"

    def find(self) -> Path | None:
        """The program, if it is here without building."""
        on_path = shutil.which(self.name)
        return Path(on_path) if on_path else Program.find(self)

    def make(self, folder: Path) -> Path:
        """Build it."""
        made = folder / self.name
        self.run(*GO_BUILD, "-o", made, self.package, folder=self.folder)
        return made


@dataclass(frozen=True, slots=True)
class OwnGoProgram(GoProgram):
    """A program of ours over a module: never one on PATH, and another one when its source changes."""

    @property
    def version(self) -> str:
        """The pinned version of the module, and a hash of the source."""
        source = hashlib.sha256((self.folder / "main.go").read_bytes()).hexdigest()[:8]
        return f"{self.pinned}-{source}"

    @property
    def needs(self) -> str:
        """What would provide it."""
        return "needs Go and `make servers`"

    def find(self) -> Path | None:
        """The program, if it is here without building."""
        return Program.find(self)


@dataclass(frozen=True, slots=True)
class DebianProgram:
    """A program that is installed from Debian's archive, by whoever may do that.

    Attributes:
        name: Of the program, as the fixture has it.
        package: What is installed.
        pattern: Where it then is; if several match, the last counts.
    """

    name: str
    package: str
    pattern: str

    def find(self) -> Path | None:
        """The program, if it is installed."""
        found = sorted(Path("/").glob(self.pattern.lstrip("/")))
        return found[-1] if found else None

    @property
    def version(self) -> str:
        """The installed version, empty if it is not."""
        done = subprocess.run(
            ["dpkg-query", "-W", "-f=${Version}", self.package], check=False, capture_output=True, text=True
        )
        return done.stdout

    def provide(self) -> Path:
        """The program, installed if need be.

        Raises:
            UnavailableServerError: We may not install, or it failed.
        """
        found = self.find()
        if found is not None:
            return found
        install = ["apt-get", "install", "--yes", "--no-install-recommends", self.package]
        if shutil.which("apt-get") is None or os.getuid() != 0:
            raise UnavailableServerError(f"needs {self.name}: `sudo {' '.join(install)}`")
        with (Path(tempfile.gettempdir()) / f"plexus-{self.package}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.find() is None:
                self._install(install)
        found = self.find()
        if found is None:
            raise UnavailableServerError(f"{self.package} has no {self.pattern}")
        return found

    @staticmethod
    def _install(install: list[str]) -> None:
        # The tests run servers of their own: the package's is not started.
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for command in (["apt-get", "update"], install):
            done = subprocess.run(
                command, timeout=BUILD_S, check=False, capture_output=True, text=True, env=environment
            )
            if done.returncode != 0:
                raise UnavailableServerError(f"`{' '.join(command)}` failed:\n{done.stderr[-2000:]}")


CONSUL = GoProgram(
    "consul", "four minutes and more", "github.com/hashicorp/consul", "github.com/hashicorp/consul"
)
TOXIPROXY = GoProgram(
    "toxiproxy",
    "half a minute",
    "github.com/Shopify/toxiproxy/v2/cmd/server",
    "github.com/Shopify/toxiproxy/v2",
)
COMPOSEFILE = OwnGoProgram("composefile", "half a minute", ".", "github.com/compose-spec/compose-go/v2")
"""Loads a Compose file with the loader of `docker compose`."""
RABBITMQ = DebianProgram("rabbitmq", "rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server")
POSTGRES = DebianProgram("postgres", "postgresql", "/usr/lib/postgresql/*/bin/postgres")
PROGRAMS: dict[str, Program | DebianProgram] = {
    program.name: program for program in (CONSUL, TOXIPROXY, COMPOSEFILE, RABBITMQ, POSTGRES)
}
"""Every program that `make servers` provides; a fixture `<name>_program` of tests/conftest.py gives it."""


def require(program: Program | DebianProgram) -> Path:
    """The program, or the test is skipped with what would provide it; in CI it fails instead."""
    try:
        return program.provide()
    except UnavailableServerError as error:
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
