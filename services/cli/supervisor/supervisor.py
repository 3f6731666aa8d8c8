"""The loop: signals, children's ends, readiness, output, control requests, timers."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from typing import IO, TYPE_CHECKING, Any

from services.cli.supervisor.child import HANDLED_SIGNALS, READY, become_subreaper
from services.cli.supervisor.control import ControlServer
from services.cli.supervisor.logs import Console, LineBuffer, RotatingFile
from services.cli.supervisor.process import Process
from services.cli.supervisor.spec import RestartPolicy, State, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.cli.supervisor.rundir import RunDir
    from services.cli.supervisor.spec import ProcessSpec

OWN_NAME = "plexus"
"""Prefix of the supervisor's own lines; its file is supervisor.log."""
_CHUNK_BYTES = 64 * 1024
_DRAIN_S = 1.0


class Supervisor:
    """Runs processes until it is told to stop.

    Args:
        specs: What to run.
        run_dir: Where logs and the control socket go; created already.
        console: Where lines are shown, if anywhere.
        policy: When ended processes start again.
        timing: Bounds of start and stop.
        on_serving: Called with the name of each process that serves, and whether all do, until all do.
        facts: Added to the answer of `status`.
        began: Monotonic time from which the start is counted; now by default.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        run_dir: RunDir,
        *,
        console: IO[str] | None = None,
        policy: RestartPolicy | None = None,
        timing: Timing | None = None,
        on_serving: Callable[[str, bool], None] | None = None,
        facts: dict[str, Any] | None = None,
        began: float | None = None,
    ) -> None:
        self._timing = timing or Timing()
        self._processes = [Process(spec, policy or RestartPolicy()) for spec in specs]
        self._run_dir = run_dir
        names = [spec.name for spec in specs]
        self._console = Console(console, [*names, OWN_NAME])
        self._files = {name: RotatingFile(run_dir.log_file(name)) for name in names}
        self._files[OWN_NAME] = RotatingFile(run_dir.log_file("supervisor"))
        self._file_failed: set[str] = set()
        self._on_serving = on_serving
        self._facts = facts or {}
        self._selector = selectors.DefaultSelector()
        self._control: ControlServer | None = None
        self._wake_read, self._wake_write = socket.socketpair()
        self._start_phase: int | None = None
        self._phase_deadline = 0.0
        self._stopping = False
        self._streams: dict[int, tuple[str, LineBuffer]] = {}
        self._began = time.monotonic() if began is None else began

    # -- life ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start everything, keep it running, and return when all of it has stopped."""
        become_subreaper()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)  # noqa: FBT003 - positional only
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in HANDLED_SIGNALS}
        old_wakeup = signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._signals)
        try:
            self._control = ControlServer(self._run_dir.socket, self._selector, self._answer)
            self._advance_start()
            while not (self._stopping and all(p.state is State.STOPPED for p in self._processes)):
                for key, _ in self._selector.select(self._timeout()):
                    key.data()
                self._timers()
            self._drain_output()
            self._control.broadcast({"event": "stopped"})
        finally:
            for process in self._processes:
                process.kill()  # only after an error of the supervisor itself is one left
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            self._close()

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        for descriptor in self._streams:
            os.close(descriptor)
        for process in self._processes:
            if process.ready_fd >= 0:
                os.close(process.ready_fd)
        for file in self._files.values():
            file.close()
        self._wake_read.close()
        self._wake_write.close()
        self._selector.close()

    def _signals(self) -> None:
        received = set(self._wake_read.recv(4096))
        if received & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            if self._stopping and signal.SIGINT in received:
                self._say("stopping at once")
                for process in self._processes:
                    process.kill()
            else:
                self.stop()
        if signal.SIGCHLD in received:
            self._reap()

    def _timeout(self) -> float | None:
        dues = [p.due for p in self._processes if p.state in {State.BACKOFF, State.STOPPING}]
        if self._start_phase is not None and not self._stopping:
            dues.append(self._phase_deadline)
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _timers(self) -> None:
        now = time.monotonic()
        for process in self._processes:
            if process.state is State.BACKOFF and process.due <= now:
                self._spawn(process)
            elif process.state is State.STOPPING and process.due <= now:
                self._say(f"{process.spec.name} did not stop in {self._timing.grace_s:g} s: killed")
                process.due = now + self._timing.grace_s
                process.kill()
        if self._start_phase is not None and not self._stopping and self._phase_deadline <= now:
            self._advance_start()

    # -- start -----------------------------------------------------------------------------------------------

    def _spawn(self, process: Process) -> None:
        descriptors = [self._wake_read.fileno(), self._wake_write.fileno(), self._selector_fd()]
        descriptors += [*self._streams, *(p.ready_fd for p in self._processes if p.ready_fd >= 0)]
        descriptors += [file.descriptor for file in self._files.values() if file.descriptor >= 0]
        if self._control is not None:
            descriptors += self._control.descriptors()
        ready, log = process.spawn([descriptor for descriptor in descriptors if descriptor >= 0])
        self._streams[log] = (process.spec.name, LineBuffer())
        self._selector.register(ready, selectors.EVENT_READ, lambda: self._readiness(process, ready))
        self._selector.register(log, selectors.EVENT_READ, lambda: self._output(log))

    def _selector_fd(self) -> int:
        fileno = getattr(self._selector, "fileno", None)  # epoll and kqueue have one, poll has none
        return int(fileno()) if fileno is not None else -1

    def _advance_start(self) -> None:
        """Start the next phase that has not begun."""
        waiting = [p for p in self._processes if p.state is State.WAITING]
        if not waiting or self._stopping:
            self._start_phase = None
            return
        self._start_phase = min(p.spec.start_phase for p in waiting)
        self._phase_deadline = time.monotonic() + self._timing.phase_wait_s
        for process in waiting:
            if process.spec.start_phase == self._start_phase:
                self._spawn(process)

    def _readiness(self, process: Process, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 64)
        except BlockingIOError:
            return
        if READY in data and process.ready_fd == descriptor:
            process.ready()
            after = time.monotonic() - self._began
            self._say(f"{process.spec.name} is serving (pid {process.pid}, {after:.2f} s)")
            if self._start_phase is not None and all(
                p.state is State.SERVING
                for p in self._processes
                if p.spec.start_phase <= self._start_phase and p.state is not State.WAITING
            ):
                self._advance_start()
            if self._on_serving is not None:
                complete = all(p.state is State.SERVING for p in self._processes)
                on_serving = self._on_serving
                if complete:
                    self._say(f"ready in {time.monotonic() - self._began:.1f} s")
                    self._on_serving = None
                on_serving(process.spec.name, complete)
        if not data:
            self._selector.unregister(descriptor)
            os.close(descriptor)
            if process.ready_fd == descriptor:
                process.ready_fd = -1

    # -- ends ------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            process = next((p for p in self._processes if p.pid == found.si_pid), None)
            if process is not None:
                process.kill()  # what it left in its group; the zombie keeps the group's number taken
            _, status = os.waitpid(found.si_pid, 0)
            if process is not None:
                self._ended(process, os.waitstatus_to_exitcode(status))

    def _ended(self, process: Process, code: int) -> None:
        name = process.spec.name
        delay = process.ended(code, wanted=self._stopping)
        if self._stopping:
            self._say(f"{name} stopped ({process.last_exit})")
            if self._control is not None:
                self._control.broadcast({"event": "stopped", "service": name})
            self._advance_stop()
        else:
            looping = ", crash loop" if process.describe()["crash_looping"] else ""
            self._say(f"{name} ended ({process.last_exit}{looping}): starts again in {delay:.1f} s")

    def stop(self) -> None:
        """Begin the ordered stop."""
        if self._stopping:
            return
        self._say("stopping")
        self._stopping = True
        for process in self._processes:
            if process.pid is None:
                process.state = State.STOPPED
        self._advance_stop()

    def _advance_stop(self) -> None:
        left = [p for p in self._processes if p.state is not State.STOPPED]
        if not left:
            return
        phase = min(p.spec.stop_phase for p in left)
        for process in left:
            if process.spec.stop_phase == phase and process.state is not State.STOPPING:
                process.terminate(self._timing.grace_s)

    # -- output ----------------------------------------------------------------------------------------------

    def _output(self, descriptor: int) -> None:
        if descriptor not in self._streams:
            return  # closed by an event of the same round
        name, buffer = self._streams[descriptor]
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        for line in buffer.feed(data) if data else buffer.end():
            self._line(name, line)
        if not data:
            del self._streams[descriptor]
            self._selector.unregister(descriptor)
            os.close(descriptor)

    def _drain_output(self) -> None:
        """Read what ended children left in their pipes."""
        deadline = time.monotonic() + _DRAIN_S
        for descriptor in list(self._streams):
            while descriptor in self._streams and _has_data(descriptor) and time.monotonic() < deadline:
                self._output(descriptor)

    def _line(self, name: str, line: bytes) -> None:
        try:
            self._files[name].write(line + b"\n")
        except OSError as error:
            if name not in self._file_failed:  # a full disk: once, and the console still shows the lines
                self._file_failed.add(name)
                self._console.line(OWN_NAME, f"log of {name} not written: {error.strerror}")
        else:
            self._file_failed.discard(name)
        self._console.line(name, line.decode(errors="replace"))

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._line(OWN_NAME, f"{stamp} {text}".encode())

    # -- control ---------------------------------------------------------------------------------------------

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        if command == "status":
            return {
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._began, 3),
                "stopping": self._stopping,
                **self._facts,
                "services": [process.describe() for process in self._processes],
            }
        if command == "down":
            self.stop()
            return {"event": "stopping"}
        return {"error": f"unknown command {command!r}"}


def _has_data(descriptor: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(0))
