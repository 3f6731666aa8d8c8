"""The whole backend, started as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from services.cli import lifecycle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]
REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 120


@dataclass(frozen=True, slots=True)
class Backend:
    """A running Plexus on a state folder of its own."""

    state: Path
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plexus(
        self, *arguments: str, check: bool = True, within_s: float = START_S + 30
    ) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
        done = subprocess.run(
            [*PLEXUS, *arguments],
            env=env
            | {"PLEXUS_STATE": str(self.state), "PLEXUS_GATEWAY__PORT": str(self.port), **self.environment},
            cwd=self.state,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stderr}\n{self.log_tail()}"
        return done

    def up(self) -> None:
        self.plexus("up", "--detach")

    def down(self) -> None:
        self.plexus("down", check=False)

    def status(self) -> dict[str, Any]:
        return lifecycle.status(self.state)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["service"]: row for row in self.status()["services"]}

    def token(self, consumer: str = "demo") -> str:
        return self.plexus("token", "--consumer", consumer).stdout.strip()

    def client(self, consumer: str = "demo") -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token(consumer)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def log_tail(self) -> str:
        return "\n".join(
            f"{file.name}: {line}"
            for file in sorted((self.state / "run/logs").glob("*.log"))
            for line in file.read_text(errors="replace").splitlines()[-8:]
        )

    def wait_serving(self, within_s: float = 30) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}

        def serving() -> bool:
            nonlocal rows
            rows = self.rows()
            return all(row["state"] == "serving" for row in rows.values())

        eventually(serving, within_s, lambda: f"{rows}\n{self.log_tail()}")
        return rows


def eventually(
    condition: Callable[[], object], within_s: float = 20, explain: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen in {within_s} s\n{explain()}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for a parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
