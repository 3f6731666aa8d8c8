"""Each benchmark, very short: it runs, and its last line is the JSON it promises. No figure is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import model_folder

REPOSITORY = Path(__file__).resolve().parents[2]
DIFFERENCES = ("added_", "sidecar_added_", "ratio_p50", "ratio_p99")
"""Figures of bench-mesh that so short a run leaves to chance, below zero or not a number."""


def run(name: str, *arguments: str, within_s: float = 280, **environment: str) -> dict[str, float]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PLEXUS_")}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *arguments],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert all(value >= 0 for name, value in figures.items() if not name.startswith(DIFFERENCES)), figures
    return figures


@pytest.mark.timeout(300)
def test_call() -> None:
    figures = run("call", "--rounds", "1", "--calls", "32")
    assert set(figures) == {"p50_ratio_c1", "p99_ratio_c1", "rate_ratio_c32"}


@pytest.mark.timeout(300)
def test_mesh() -> None:
    short = ("--rounds", "1", "--seconds", "0.5", "--rates", "40")
    figures = run("mesh", *short, "--paths", "plexus", "envoy")
    assert set(figures) == {
        *("added_p50_ms", "added_p99_ms", "sidecar_added_p50_ms", "sidecar_added_p99_ms"),
        *("ratio_p50", "ratio_p99"),
    }


@pytest.mark.timeout(300)
def test_schedules() -> None:
    figures = run("schedules", "--count", "50")
    assert set(figures) == {"schedules", "stored", "seconds", "p50_ms", "p99_ms", "cpu_s", "idle_cpu"}
    assert figures["stored"] == 50


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


@pytest.mark.timeout(300)
def test_start() -> None:
    assert set(run("start", "--runs", "1", "--settle-s", "0")) == {"ready_s", "idle_pss_mib"}


@pytest.mark.timeout(300)
def test_answers(tmp_path: Path) -> None:
    pages = {
        "library/shutil": "<h1>shutil</h1><p>copytree() copies a whole directory tree.</p>",
        "library/json": "<h1>json</h1><p>dumps() converts a Python object to a JSON string.</p>",
        "library/heapq": "<h1>heapq</h1><p>nlargest() gives the n largest elements of a heap.</p>",
    }
    (tmp_path / "library").mkdir()
    for name, body in pages.items():
        (tmp_path / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    figures = run("answers", "--docs", str(tmp_path), PLEXUS_TEST_MODELS=str(model_folder()))
    assert set(figures) == {"hit_at_3", "pipeline_ratio", "pages_per_s", "chunks_per_s"}
    assert figures["hit_at_3"] == 1


@pytest.mark.timeout(300)
def test_queueing(rabbitmq_program: Path) -> None:
    assert rabbitmq_program.is_file()
    figures = run("queueing", "--messages", "300", "--sizes", "256")
    assert set(figures) == {
        *("publish_ratio", "consume_ratio"),
        *("celery_ratio", "celery_unconfirmed_ratio", "celery_queued_ratio"),
        *("sqlite_batch_per_s", "sqlite_ratio", "p50_ms", "p99_ms", "load"),
    }
