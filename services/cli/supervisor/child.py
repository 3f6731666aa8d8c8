"""What happens in a child between fork and exit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from services.cli.supervisor import backend
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.cli.supervisor.spec import Run

READY = b"R"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
"""What the supervisor handles and a child must not inherit."""
ORPHAN_GRACE_S = 20
"""A child whose supervisor died ends at the latest after this many seconds."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def become_subreaper() -> None:
    """Let descendants whose parent dies become children of this process, so that it can reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (*HANDLED_SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def run_child(run: Run, parent: int, ready_fd: int, log_fd: int, close: Iterable[int]) -> NoReturn:
    """Turn this freshly forked process into a child and never return.

    Args:
        run: What to do.
        parent: Pid of the supervisor.
        ready_fd: Pipe that takes READY.
        log_fd: Pipe that takes stdout and stderr.
        close: Descriptors of the supervisor that the child must not keep.
    """
    code = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _reset_signals()
        if os.getppid() != parent:  # it died before the line above could tell the kernel
            os._exit(0)
        os.setsid()
        for descriptor in close:
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(source, target)
        for descriptor in {null, log_fd} - {0, 1, 2}:
            os.close(descriptor)
        os.set_inheritable(ready_fd, False)  # noqa: FBT003 - positional only
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - the same
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115 - same
        backend.collect_seldom()
        asyncio.run(_main(run, parent, ready_fd))
        code = 0
    except PlexusError as error:  # such as a wrong configuration: one line says it all
        print(f"{error.reason}: {error.message}", file=sys.stderr)  # noqa: T201 - the child's own log
    except BaseException:  # noqa: BLE001 - the process ends here; the log must say why
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # atexit handlers and threads belong to the supervisor's image


async def _main(run: Run, parent: int, ready_fd: int) -> None:
    stop = asyncio.Event()

    def asked() -> None:
        if os.getppid() != parent:  # the supervisor is gone and so is the reader of the log pipe
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_GRACE_S)  # SIGALRM's default ends a stuck drain
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asked)
    if os.getppid() != parent:
        asked()
    await run(_announcer(ready_fd), stop)


def _announcer(ready_fd: int) -> Callable[[], None]:
    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor is gone; SIGTERM is under way
            os.write(ready_fd, READY)

    return ready
