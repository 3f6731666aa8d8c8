"""One process of the backend in the foreground, for an orchestrator that keeps each running by itself."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import signal
from typing import TYPE_CHECKING

import structlog

from services.cli import settings
from services.cli.supervisor import backend, rundir
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.cli.supervisor.spec import Run

log = structlog.get_logger(__name__)


def serve(state_dir: Path, name: str, *, number: int, http_port: int) -> None:
    """Run a process until SIGTERM or SIGINT, then stop it in order.

    Args:
        state_dir: The state folder; each process of a host may have its own, or all share one.
        name: `control`, `edge` or a service.
        number: Which of its instances on this host.
        http_port: Where the edge listens.

    Raises:
        InvalidArgumentError: There is no such process, or it cannot have so many instances.
        FailedPreconditionError: It runs on this folder already.
    """
    run_dir = rundir.RunDir(state_dir.resolve())
    run_dir.create()
    control_port = settings.control_port(run_dir)
    counts = backend.scale([f"{name}={number}"]) if number > 1 else {}
    specs = {spec.name: spec for spec in backend.specs(run_dir.state_dir, http_port, control_port, counts)}
    wanted = name if number == 1 else f"{name}-{number}"
    if wanted not in specs:
        raise InvalidArgumentError(f"no process is called {name!r}; there are: {', '.join(specs)}")
    with _alone(run_dir, wanted):
        backend.collect_seldom()
        asyncio.run(_until_told(specs[wanted].run, wanted))


@contextlib.contextmanager
def _alone(run_dir: rundir.RunDir, name: str) -> Iterator[None]:
    if rundir.is_locked(run_dir):
        raise FailedPreconditionError(
            f"`plexus up` runs on {run_dir.state_dir}: `plexus down` first, or another folder with --state",
            reason="ALREADY_RUNNING",
        )
    with run_dir.log_file(name).with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(
                f"{name} runs on {run_dir.state_dir} already", reason="ALREADY_RUNNING"
            ) from None
        yield


async def _until_told(run: Run, name: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(lambda: log.info("ready", process=name), stop)
