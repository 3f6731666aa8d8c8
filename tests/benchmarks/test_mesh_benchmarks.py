"""Benchmarks of the mesh, very short: each prints the JSON that it promises. No figure is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.run import run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
def test_mesh() -> None:
    short = ("--rounds", "1", "--seconds", "0.5", "--rates", "40")
    figures = run("mesh", *short, "--paths", "plexus", "envoy")
    assert set(figures) == {
        *("added_p50_ms", "added_p99_ms", "sidecar_added_p50_ms", "sidecar_added_p99_ms"),
        *("ratio_p50", "ratio_p99"),
    }


@pytest.mark.timeout(300)
def test_intentions(consul_program: Path) -> None:
    assert consul_program.is_file()
    figures = run("intentions", "--changes", "1")
    assert set(figures) == {"files_p50_s", "files_p99_s", "consul_p50_s", "consul_p99_s"}


@pytest.mark.timeout(300)
def test_control() -> None:
    figures = run("control", "--services", "5", "--clients", "4", "--changes", "2", "--idle-s", "0.2")
    assert set(figures) == {"ack_p50_s", "ack_p99_s", "idle_cpu_percent", "rss_mib"}


@pytest.mark.timeout(620)
def test_rolling(consul_program: Path) -> None:
    assert consul_program.is_file()
    figures = run("rolling", "--mode", "smoke", "--rate", "50", within_s=600)
    assert set(figures) == {
        "rolling_failed",
        "kill_failed",
        "rotation_failed",
        "outage_failed",
        "retry_amplification",
        "canary_error_points",
    }
