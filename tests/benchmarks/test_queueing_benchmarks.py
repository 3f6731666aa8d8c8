"""Benchmarks of queueing, very short: each prints the JSON that it promises. No figure is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.run import run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
def test_queueing(rabbitmq_program: Path) -> None:
    assert rabbitmq_program.is_file()
    figures = run("queueing", "--messages", "300", "--sizes", "256", "--turns", "1")
    assert set(figures) == {
        *("publish_ratio", "consume_ratio"),
        *("celery_ratio", "celery_unconfirmed_ratio", "celery_queued_ratio"),
        *("sqlite_batch_per_s", "sqlite_ratio", "p50_ms", "p99_ms", "load"),
    }


@pytest.mark.timeout(300)
def test_schedules() -> None:
    figures = run("schedules", "--count", "50")
    assert set(figures) == {"schedules", "stored", "seconds", "p50_ms", "p99_ms", "cpu_s", "idle_cpu"}
    assert figures["stored"] == 50


@pytest.mark.timeout(300)
def test_sagas() -> None:
    figures = run("sagas", "--count", "10", "--at-once", "4")
    assert set(figures) == {
        *("sagas", "per_s", "chain_per_s", "dbos_per_s", "ratio", "p50_ms", "p99_ms"),
        *("cpu_ms", "chain_cpu_ms", "worker_cpu_ms", "caller_cpu_ms", "dbos_cpu_ms"),
        *("statements", "commits", "load"),
    }
