"""Dapr's sidecar and its certificate authority, which only `make bench-mesh` builds and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.servers.programs import GoProgram, Program

_MODULE = "github.com/dapr/dapr"


@dataclass(frozen=True, slots=True)
class DaprProgram(GoProgram):
    """Built from `go/dapr`, and never one on PATH: that would have any version, and `sentry` many owners."""

    @property
    def folder(self) -> Path:
        """Where go.mod and go.sum are."""
        return Path(__file__).resolve().parent / "go" / "dapr"

    @property
    def needs(self) -> str:
        """What would provide it."""
        return f"{self.name} is built with Go, which is not here"

    def find(self) -> Path | None:
        """The program, if it is here without building."""
        return Program.find(self)


DAPRD = DaprProgram("daprd", "two minutes and more", ".", _MODULE)
SENTRY = DaprProgram("dapr-sentry", "one minute", f"{_MODULE}/cmd/sentry", _MODULE)
