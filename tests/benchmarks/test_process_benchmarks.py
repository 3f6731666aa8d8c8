"""Benchmarks of processes and answers, very short: each prints the JSON it promises. No figure is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.run import run
from tests.models import model_folder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
def test_call() -> None:
    figures = run("call", "--rounds", "1", "--calls", "32")
    assert set(figures) == {"p50_ratio_c1", "p99_ratio_c1", "rate_ratio_c32"}


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
