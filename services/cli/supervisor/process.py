"""One supervised process: its descriptors, state and history."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from services.cli.supervisor.backoff import Backoff
from services.cli.supervisor.child import HANDLED_SIGNALS, run_child
from services.cli.supervisor.spec import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.cli.supervisor.spec import ProcessSpec, RestartPolicy


class Process:
    """A process and what the supervisor knows about it."""

    def __init__(self, spec: ProcessSpec, policy: RestartPolicy) -> None:
        self.spec = spec
        self.state = State.WAITING
        self.pid: int | None = None
        self.restarts = 0
        self.last_exit: str | None = None
        self.started_at = 0.0
        """Wall clock, for people."""
        self.ready_fd = -1
        self.due = 0.0
        """Monotonic time of the next start (back-off) or of SIGKILL (stopping)."""
        self._backoff = Backoff(policy)
        self._serving_since: float | None = None

    def spawn(self, close: Iterable[int]) -> tuple[int, int]:
        """Fork the child.

        Returns:
            Descriptors to read readiness and log bytes from; the caller closes them.
        """
        ready_read, ready_write = os.pipe()
        log_read, log_write = os.pipe()
        parent = os.getpid()
        # Until the child has its own handlers, a signal to it would reach the supervisor's wake-up socket.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                run_child(self.spec.run, parent, ready_write, log_write, [*close, ready_read, log_read])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(ready_write)
        os.close(log_write)
        for descriptor in (ready_read, log_read):
            os.set_blocking(descriptor, False)
        self.pid = pid
        self.ready_fd = ready_read
        self.started_at = time.time()
        self.state = State.STARTING
        self._serving_since = None
        return ready_read, log_read

    def ready(self) -> None:
        """Note that the child serves."""
        if self.state is State.STARTING:
            self.state = State.SERVING
            self._serving_since = time.monotonic()

    def terminate(self, grace_s: float) -> None:
        """Ask the child to drain and end."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            self.state = State.STOPPING
            self.due = time.monotonic() + grace_s
        else:
            self.state = State.STOPPED

    def kill(self) -> None:
        """End the child's whole process group at once."""
        if self.pid is None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)  # forked, but not yet a group of its own

    def ended(self, code: int, *, wanted: bool) -> float:
        """Note the end of the child, already reaped.

        Args:
            code: As os.waitstatus_to_exitcode gives it.
            wanted: Whether the supervisor is stopping.

        Returns:
            Seconds until the restart; 0 if there is none.
        """
        now = time.monotonic()
        self.pid = None
        self.last_exit = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        if wanted:
            self.state = State.STOPPED
            return 0.0
        served = now - self._serving_since if self._serving_since is not None else 0.0
        delay = self._backoff.delay(now, served)
        self.restarts += 1
        self.state = State.BACKOFF
        self.due = now + delay
        return delay

    def describe(self) -> dict[str, Any]:
        """Its row in `plexus status`."""
        return {
            "service": self.spec.name,
            "state": str(self.state),
            "address": self.spec.address,
            "pid": self.pid,
            "uptime_s": round(time.time() - self.started_at, 3) if self.pid is not None else None,
            "restarts": self.restarts,
            "crash_looping": self._backoff.looping,
            "last_exit": self.last_exit,
            "retry_in_s": round(max(0.0, self.due - time.monotonic()), 3)
            if self.state is State.BACKOFF
            else None,
        }
