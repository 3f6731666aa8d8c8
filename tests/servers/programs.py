"""Servers that tests run: where the program comes from.

In this order: a binary on PATH, the one in the project's cache, a build from the Go module pinned in
`go/<name>/`. The cache is outside the checkout and keyed by version, so a build is made once a machine.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "plexus" / "servers"
BUILD_S = 3600
"""Longest build, in seconds; a minute or several on an idle machine of two cores."""


class UnavailableServerError(Exception):
    """The program is neither here nor can it be built; the text says what would provide it."""


@dataclass(frozen=True, slots=True)
class GoProgram:
    """A program that is built from a Go module.

    Attributes:
        name: Of the program and of its folder in `go/`.
        package: What to build.
        module: Whose version in go.mod is the program's.
        takes: Roughly how long a build takes.
    """

    name: str
    package: str
    module: str
    takes: str

    @property
    def folder(self) -> Path:
        """Where go.mod and go.sum are."""
        return _HERE / "go" / self.name

    @property
    def version(self) -> str:
        """The pinned version."""
        found = re.search(rf"{re.escape(self.module)} (v\S+)", (self.folder / "go.mod").read_text())
        if found is None:
            raise ValueError(f"{self.folder}/go.mod does not require {self.module}")
        return found[1]

    @property
    def cached(self) -> Path:
        """Where the built program lies."""
        return CACHE / f"{self.name}-{self.version}" / self.name

    def find(self) -> Path | None:
        """The program, if it is here without building."""
        on_path = shutil.which(self.name)
        if on_path:
            return Path(on_path)
        return self.cached if self.cached.is_file() else None

    def provide(self) -> Path:
        """The program, built if need be; whoever comes meanwhile waits for the same build.

        Raises:
            UnavailableServerError: There is no Go, or the build failed.
        """
        found = self.find()
        if found is not None:
            return found
        if shutil.which("go") is None:
            raise UnavailableServerError(f"needs {self.name} on PATH, or Go and `make servers`")
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        with (self.cached.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.cached.is_file():
                self._build()
        return self.cached

    def _build(self) -> None:
        print(f"building {self.name} {self.version}; {self.takes} on two cores", file=sys.stderr, flush=True)  # noqa: T201 - minutes of silence look like a hang
        with tempfile.TemporaryDirectory(dir=self.cached.parent) as folder:
            made = Path(folder) / self.name
            command = ["go", "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(made)]
            if shutil.which("nice"):
                command = ["nice", "-n", "5", *command]
            done = subprocess.run(
                [*command, self.package],
                cwd=self.folder,
                timeout=BUILD_S,
                check=False,
                stderr=subprocess.PIPE,
            )
            if done.returncode != 0:
                reason = done.stderr.decode(errors="replace")[-2000:]
                raise UnavailableServerError(f"`make servers` could not build {self.name}:\n{reason}")
            made.replace(self.cached)


CONSUL = GoProgram(
    "consul", "github.com/hashicorp/consul", "github.com/hashicorp/consul", "four minutes and more"
)
PROGRAMS = {program.name: program for program in (CONSUL,)}
"""Every program that `make servers` provides; a fixture `<name>_program` of tests/conftest.py gives it."""


def require(program: GoProgram) -> Path:
    """The program, or the test is skipped with what would provide it; in CI it fails instead."""
    try:
        return program.provide()
    except UnavailableServerError as error:
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
