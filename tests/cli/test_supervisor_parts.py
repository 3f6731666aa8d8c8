"""The parts of the supervisor that need no process."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from services.cli.supervisor import rundir
from services.cli.supervisor.backoff import Backoff
from services.cli.supervisor.logs import MAX_LINE_BYTES, Console, LineBuffer, RotatingFile, readable
from services.cli.supervisor.spec import RestartPolicy
from services.runtime.errors import FailedPreconditionError
from tests.ports import free_port


@pytest.fixture
def run_dir(tmp_path: Path) -> rundir.RunDir:
    made = rundir.RunDir(tmp_path)
    made.create()
    return made


def test_delays_grow_to_the_maximum_and_reset_after_settled_service() -> None:
    backoff = Backoff(RestartPolicy(initial_s=1, factor=2, max_s=5, jitter=0, budget=100))
    assert [backoff.delay(now, 0) for now in range(5)] == [1, 2, 4, 5, 5]
    assert backoff.delay(10, served_s=60) == 1


def test_a_spent_budget_waits_the_maximum_until_the_window_has_passed() -> None:
    backoff = Backoff(RestartPolicy(initial_s=1, max_s=30, jitter=0, budget=2, window_s=60, settled_s=5))
    assert [backoff.delay(now, served_s=10) for now in (0, 1)] == [1, 1]
    assert backoff.delay(2, served_s=10) == 30
    assert backoff.looping
    assert backoff.delay(100, served_s=10) == 1
    assert not backoff.looping


def test_delays_are_spread() -> None:
    policy = RestartPolicy(initial_s=1, jitter=0.2)
    delays = {Backoff(policy, random.Random(seed)).delay(0, 0) for seed in range(20)}
    assert len(delays) == 20
    assert all(0.8 <= delay <= 1.2 for delay in delays)


def test_lines_are_cut_across_reads_and_long_ones_are_bounded() -> None:
    buffer = LineBuffer()
    assert buffer.feed(b"a\nb") == [b"a"]
    assert buffer.feed(b"c\n\n") == [b"bc", b""]
    long = buffer.feed(b"x" * (MAX_LINE_BYTES + 5))
    assert [len(line) for line in long] == [MAX_LINE_BYTES]
    assert buffer.end() == [b"x" * 5]


def test_a_log_rotates_and_keeps_its_last_files(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "a.log", max_bytes=10, keep=2)
    for letter in b"abcdef":
        file.write(bytes([letter]) * 7 + b"\n")
    file.close()
    kept = {path.name: path.read_bytes()[:1] for path in tmp_path.iterdir()}
    assert kept == {"a.log": b"f", "a.log.1": b"e", "a.log.2": b"d"}


def test_logs_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "a.log")
    file.write(b"x\n")
    file.close()
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600


def test_a_json_line_becomes_readable_and_others_stay() -> None:
    line = '{"timestamp": "2026-11-01T10:20:30Z", "level": "info", "event": "serving", "port": 7}'
    assert readable(line) == "10:20:30 info    serving port=7"
    assert readable("plain {text}") == "plain {text}"
    assert readable("{broken") == "{broken"


def test_lines_for_a_full_pipe_are_dropped_and_counted() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as writer:
        console = Console(writer, ["a"])
        try:
            while True:
                os.write(write, b"x" * 4096)
        except BlockingIOError:
            console.line("a", "lost")
            console.line("a", "lost too")
        os.read(reader.fileno(), 1 << 20)
        console.line("a", "seen")
        text = os.read(reader.fileno(), 4096).decode()
    assert "2 lines not shown" in text
    assert text.endswith("a | seen\n")


def test_the_control_port_is_the_same_after_a_restart(run_dir: rundir.RunDir) -> None:
    assert rundir.control_port(run_dir) == rundir.control_port(run_dir)


def test_the_system_never_gives_the_control_port_to_someone_else_by_itself(run_dir: rundir.RunDir) -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not low <= rundir.control_port(run_dir) <= high


@pytest.mark.parametrize("damage", ["", "{", '{"control": "x"}', '{"control": 99999}', "[]"])
def test_a_damaged_port_file_is_replaced(run_dir: rundir.RunDir, damage: str) -> None:
    run_dir.ports.write_text(damage)
    port = rundir.control_port(run_dir)
    assert rundir.control_port(run_dir) == port


def test_a_port_lost_to_someone_else_is_replaced(run_dir: rundir.RunDir) -> None:
    port = rundir.control_port(run_dir)
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", port))
        assert rundir.control_port(run_dir) != port


def test_a_taken_http_port_is_refused_with_a_remedy() -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(FailedPreconditionError, match="--port"):
            rundir.check_http_port("127.0.0.1", port)
    rundir.check_http_port("127.0.0.1", port)
