"""The supervisor over small processes that are real: forked, killed, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from services.cli.supervisor import control, rundir
from services.runtime.errors import FailedPreconditionError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM = Path(__file__).with_name("supervised.py")


class Running:
    """A running supervisor and its console."""

    def __init__(self, state: Path, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.run_dir = rundir.RunDir(state)
        self.seen: list[str] = []

    def until(self, text: str) -> str:
        """Read the console up to a line that contains `text`; pytest's timeout bounds it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(line.rstrip())
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n" + "\n".join(self.seen))

    def rows(self) -> dict[str, dict[str, Any]]:
        answer = control.ask(self.run_dir.socket, "status")
        return {row["service"]: row for row in answer["services"]}


@contextmanager
def supervise(state: Path, *specs: str, **options: Any) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(state), *specs],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options},
    )
    try:
        yield Running(state, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        eventually(lambda: not rundir.is_locked(rundir.RunDir(state)))


def eventually(condition: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_is_prefixed_and_kept_in_a_file_of_its_own(tmp_path: Path) -> None:
    with supervise(tmp_path, "alpha=plain", "beta=plain") as running:
        running.until("ALL READY")
        os.kill(running.process.pid, signal.SIGTERM)
        running.until("alpha  | drained")
        assert running.process.wait(20) == 0
    assert (tmp_path / "run/logs/alpha.log").read_text() == "hello\ndrained\n"
    assert "beta   | hello" in running.seen


def test_phases_start_in_order_and_stop_from_the_outside_in(tmp_path: Path) -> None:
    with supervise(tmp_path, "outer=plain:2:0", "middle=plain:1:1", "core=plain:0:2") as running:
        running.until("ALL READY")
        started = [line.split()[3] for line in running.seen if "is serving" in line]
        os.kill(running.process.pid, signal.SIGINT)
        running.until("core stopped")
    assert started == ["core", "middle", "outer"]
    stopped = [line.split()[3] for line in running.seen if " stopped (" in line]
    assert stopped == ["outer", "middle", "core"]


def test_a_killed_process_comes_back_and_the_others_never_notice(tmp_path: Path) -> None:
    with supervise(tmp_path, "alpha=plain", "beta=plain") as running:
        running.until("ALL READY")
        before = running.rows()
        os.kill(before["alpha"]["pid"], signal.SIGKILL)
        running.until("alpha ended (SIGKILL)")
        running.until("alpha is serving")
        after = running.rows()
    assert after["alpha"]["pid"] != before["alpha"]["pid"]
    assert after["alpha"]["restarts"] == 1
    assert after["beta"] == before["beta"] | {"uptime_s": after["beta"]["uptime_s"]}


def test_a_crash_loop_stays_in_backoff_says_why_and_stops_nobody(tmp_path: Path) -> None:
    with supervise(tmp_path, "bad=crash:0", "good=plain:1") as running:
        running.until(
            "good is serving"
        )  # a phase whose processes fail holds the next one back only for a while
        running.until("crash loop")
        rows = running.rows()
        assert rows["bad"]["crash_looping"]
        assert rows["bad"]["last_exit"] == "exit code 1"
        assert rows["good"]["state"] == "serving"
        list(control.call(running.run_dir.socket, {"command": "down"}, 20))
    assert "RuntimeError: cannot start" in (tmp_path / "run/logs/bad.log").read_text()


def test_what_does_not_drain_is_killed_after_the_grace(tmp_path: Path) -> None:
    with supervise(tmp_path, "stuck=stubborn", "good=plain:0:1") as running:
        running.until("ALL READY")
        events = list(control.call(running.run_dir.socket, {"command": "down"}, 20))
        running.process.wait(20)
    assert events == [
        {"event": "stopping"},
        {"event": "stopped", "service": "stuck"},
        {"event": "stopped", "service": "good"},
        {"event": "stopped"},
    ]


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with supervise(tmp_path, "stuck=stubborn") as running:
        running.until("ALL READY")
        os.kill(running.process.pid, signal.SIGINT)
        running.until("stopping")
        os.kill(running.process.pid, signal.SIGINT)
        running.until("stuck stopped (SIGKILL)")


@pytest.mark.skipif(sys.platform != "linux", reason="needs PDEATHSIG")
def test_nothing_outlives_a_killed_supervisor_and_the_folder_is_free_only_then(tmp_path: Path) -> None:
    with supervise(tmp_path, "alpha=plain", "edge=parent") as running:
        running.until("ALL READY")
        pids = [row["pid"] for row in running.rows().values()]
        running.process.kill()
        # The next one waits for the children of the first, which drain.
        with supervise(tmp_path, "alpha=plain") as second:
            second.until("ALL READY")
            assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="needs process groups and /proc")
def test_the_children_of_a_killed_process_are_ended_with_it(tmp_path: Path) -> None:
    with supervise(tmp_path, "edge=parent") as running:
        running.until("ALL READY")
        grandchild = int((tmp_path / "grandchild").read_text())
        os.kill(running.rows()["edge"]["pid"], signal.SIGKILL)
        running.until("edge is serving")
        eventually(lambda: not alive(grandchild))


def test_a_reader_that_stops_reading_holds_nothing_up(tmp_path: Path) -> None:
    """The console's pipe is full; the process logs on and the control socket answers."""
    with supervise(tmp_path, "loud=chatty") as running:
        eventually(running.run_dir.socket.exists)
        eventually(lambda: running.rows()["loud"]["state"] == "serving")
        assert (tmp_path / "run/logs/loud.log").read_text().endswith("line 19999 " + "x" * 60 + "\n")
        running.process.terminate()
        running.process.wait(20)
    assert "loud stopped" in (tmp_path / "run/logs/supervisor.log").read_text()


def test_two_supervisors_never_share_a_state_folder(tmp_path: Path) -> None:
    with supervise(tmp_path, "alpha=plain") as running:
        running.until("ALL READY")
        with pytest.raises(FailedPreconditionError, match=rf"already runs on .*pid {running.process.pid}"):
            rundir.acquire_lock(running.run_dir, 0)


def test_a_state_folder_with_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120)
    with supervise(state, "alpha=plain") as running:
        running.until("ALL READY")
        socket = running.run_dir.socket
        assert len(str(socket)) < 100
        assert socket.stat().st_mode & 0o777 == 0o600
        assert socket.parent.stat().st_mode & 0o077 == 0
        assert running.rows()["alpha"]["state"] == "serving"


def test_rubbish_on_the_control_socket_is_refused(tmp_path: Path) -> None:
    with supervise(tmp_path, "alpha=plain") as running:
        running.until("ALL READY")
        assert control.ask(running.run_dir.socket, "x") == {"error": "unknown command 'x'"}
        with pytest.raises(UnavailableError):
            control.ask(running.run_dir.socket, "y" * 10_000)
        assert running.rows()["alpha"]["state"] == "serving"


def test_asking_when_nothing_runs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="plexus up"):
        control.ask(rundir.RunDir(tmp_path).socket, "status")


DETACHED = """
import sys
from pathlib import Path
from services.cli.supervisor.detach import run_detached

def body(tell):
    tell({"progress": "one"})
    tell({"progress": "two"})
    tell({"edge": "there"})

print(run_detached(body, Path(sys.argv[1]), 60, print))
"""


def test_a_start_in_the_background_tells_its_progress_and_returns_its_report(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", DETACHED, str(tmp_path / "log")],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.stdout.splitlines() == ["one", "two", "{'edge': 'there'}"]
