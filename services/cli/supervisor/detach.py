"""Leaving the terminal: a double fork whose first process waits for news of the second."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any

from services.runtime.errors import DeadlineExceededError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run_detached(
    body: Callable[[Callable[[dict[str, Any]], None]], None],
    log: Path,
    timeout_s: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run `body` in a process of its own session and wait until it reports.

    Must be called before this process has threads.

    Args:
        body: Gets a function that reports JSON objects; the first without `progress` ends the wait.
        log: Takes the process's stdout and stderr.
        timeout_s: Longest wait. The process goes on after it.
        progress: Gets each text that is reported as `progress`.

    Returns:
        The report.

    Raises:
        PlexusError: What `body` raised before it reported.
        UnavailableError: The process ended without a report.
        DeadlineExceededError: No report in time.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    first = os.fork()
    if first == 0:
        os.close(read)
        _detached(body, log, write)
    os.close(write)
    os.waitpid(first, 0)
    report = _wait(read, timeout_s, progress)
    os.close(read)
    if report is None:
        raise DeadlineExceededError(f"no report after {timeout_s:g} s; see `plexus status` and `plexus logs`")
    if "error" in report:
        raise PlexusError(report["error"])
    return report


def _wait(descriptor: int, timeout_s: float, progress: Callable[[str], None]) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    received = b""
    while True:
        line, complete, rest = received.partition(b"\n")
        if complete:
            received = rest
            report: dict[str, Any] = json.loads(line)
            if "progress" not in report:
                return report
            progress(report["progress"])
            continue
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        data = os.read(descriptor, 4096)
        if not data:
            raise UnavailableError("Plexus ended while starting: see `plexus logs supervisor`")
        received += data


def _detached(body: Callable[[Callable[[dict[str, Any]], None]], None], log: Path, write: int) -> None:
    """Fork once more, so that the second process is nobody's child and no session leader."""
    code = 1
    try:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(output)

        def tell(report: dict[str, Any]) -> None:
            with contextlib.suppress(BrokenPipeError):  # whoever waited has given up
                os.write(write, json.dumps(report).encode() + b"\n")

        try:
            body(tell)
            code = 0
        except PlexusError as error:
            tell({"error": error.message})
    except BaseException:  # noqa: BLE001 - the process ends here; its log must say why
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)
