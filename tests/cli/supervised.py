"""A supervisor over small processes, run by test_supervisor.py as a program of its own: it forks.

Usage: supervised.py STATE NAME=BEHAVIOUR[:START_PHASE[:STOP_PHASE]]…
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.cli.supervisor import rundir
from services.cli.supervisor.spec import ProcessSpec, RestartPolicy, Timing
from services.cli.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = Path(sys.argv[1])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def plain(ready: Callable[[], None], stop: asyncio.Event) -> None:
    say("hello")
    ready()
    await stop.wait()
    say("drained")


async def crash(_ready: Callable[[], None], _stop: asyncio.Event) -> None:
    raise RuntimeError("cannot start")


async def stubborn(ready: Callable[[], None], _stop: asyncio.Event) -> None:
    ready()
    await asyncio.Event().wait()


async def parent(ready: Callable[[], None], stop: asyncio.Event) -> None:
    process = subprocess.Popen(["/bin/sleep", "1000"])
    (STATE / "grandchild").write_text(str(process.pid))
    ready()
    await stop.wait()
    process.terminate()
    process.wait()


async def chatty(ready: Callable[[], None], stop: asyncio.Event) -> None:
    for number in range(20_000):
        say(f"line {number} " + "x" * 60)
    ready()
    await stop.wait()


def spec(argument: str) -> ProcessSpec:
    name, _, rest = argument.partition("=")
    behaviour, *phases = rest.split(":")
    start, stop = [*map(int, phases), 0, 0][:2]
    return ProcessSpec(name, globals()[behaviour], start, stop)


def main() -> None:
    run_dir = rundir.RunDir(STATE)
    run_dir.create()
    lock = rundir.acquire_lock(run_dir, 20)
    Supervisor(
        [spec(argument) for argument in sys.argv[2:]],
        run_dir,
        console=sys.stdout,
        policy=RestartPolicy(initial_s=0.05, max_s=0.2, budget=3),
        timing=Timing(phase_wait_s=0.5, grace_s=1),
        on_serving=None
        if "loud=chatty" in sys.argv
        else lambda _, complete: say("ALL READY") if complete else None,  # it would wait for the reader
    ).run()
    assert lock >= 0


if __name__ == "__main__":
    main()
