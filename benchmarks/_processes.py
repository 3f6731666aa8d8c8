"""The processes of a benchmark: started, asked by JSON lines, watched through /proc, ended."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

ANSWER_S = 180.0
"""Longest wait for a line."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Process:
    """A running program; those of ours say a JSON line when they are ready, and one for each command."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    async def read(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_S)
        if not line:
            sys.exit(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    async def ask(self, command: str, **options: Any) -> Any:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({command: options}).encode() + b"\n")
        return (await self.read())["answer"]

    async def listening(self, port: int) -> None:
        """Wait until it takes connections."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                if self._process.returncode is not None:
                    sys.exit(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-2000:]}")
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.close()
                return

    def cpu_s(self) -> float:
        """CPU time so far, user and system."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def pss_mib(self) -> float:
        """Memory: its own and its share of what it shares."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def end(self, how: signal.Signals = signal.SIGTERM, *, within_s: float = 10) -> None:
        """Ask it to end, and make it."""
        if self._process.returncode is None:
            self.send(how)
            try:
                await asyncio.wait_for(self._process.wait(), within_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


class Processes:
    """Those that a benchmark starts; all end with it, the last first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._started):  # a server says goodbye to the control plane it joined
            await process.end()

    async def start(self, name: str, *command: str | Path, **variables: str) -> Process:
        """Start a program; what it writes to stderr is kept in a file."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PLEXUS_")}
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment | variables,
                limit=64 * 1024 * 1024,
            )
        started = Process(name, process, log)
        self._started.append(started)
        return started

    async def python(
        self, name: str, *command: str | Path, **variables: str
    ) -> tuple[Process, dict[str, Any]]:
        """Start a program of ours and wait until it is ready; what it said then."""
        process = await self.start(name, sys.executable, *command, **variables)
        return process, await process.read()
