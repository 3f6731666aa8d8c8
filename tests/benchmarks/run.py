"""Runs a benchmark, very short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
