"""Start: from `plexus up` to every process SERVING and the edge answering, and the memory of all of it idle.

The last line is one JSON object: {"ready_s": …, "idle_pss_mib": …}. Bars: 3 s, 512 MiB (two cores, installed
packages, warm file cache).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port

BAR_READY_S = 3.0
BAR_IDLE_PSS_MIB = 512.0
PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]
MIB = 1024 * 1024


def plexus(state: str, *arguments: str) -> str:
    """Run the command; its stdout."""
    done = subprocess.run(  # noqa: S603 - our own command
        [*PLEXUS, *arguments, "--state", state], check=False, capture_output=True, text=True, timeout=180
    )
    if done.returncode:
        sys.exit(f"plexus {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def measure(state: str, settle_s: float) -> tuple[float, dict[str, Any]]:
    """Start, wait for the edge, let it settle, look, stop.

    Returns:
        Seconds to ready, and the status when idle.
    """
    port = free_port()
    began = time.monotonic()
    plexus(state, "up", "--detach", "--port", str(port))
    try:
        with httpx.Client(timeout=5) as client:
            while True:
                try:
                    if client.get(f"http://127.0.0.1:{port}/healthz").is_success:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() - began > 60:
                    sys.exit("the edge does not answer")
                time.sleep(0.005)
        ready_s = time.monotonic() - began
        time.sleep(settle_s)
        return ready_s, json.loads(plexus(state, "status", "--json"))
    finally:
        plexus(state, "down")


def serving_times(state: str) -> dict[str, str]:
    """What the supervisor logged about the last start: seconds from its own begin, by process."""
    log = (Path(state) / "run/logs/supervisor.log").read_text()
    return dict(re.findall(r"(\S+) is serving \(pid \d+, ([\d.]+) s\)", log))


def main() -> None:
    """Measure a first start and several later ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="starts on an existing state folder")
    parser.add_argument("--settle-s", type=float, default=2.0, help="pause before memory is read")
    options = parser.parse_args()
    os.environ.pop("PLEXUS_STATE", None)

    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as state:
        first_s, _ = measure(state, 0.0)
        runs = []
        for _ in range(options.runs):
            runs.append(measure(state, options.settle_s))
            print(f"start {len(runs)}: {runs[-1][0]:.2f} s", file=sys.stderr)
        times = serving_times(state)

    status = runs[-1][1]
    print(f"\n{'process':<12} {'serving after s':>15} {'PSS MiB':>9}")
    for row in status["services"]:
        print(
            f"{row['service']:<12} {times.get(row['service'], '?'):>15} {(row['pss_bytes'] or 0) / MIB:>9.1f}"
        )
    print(f"{'supervisor':<12} {'':>15} {(status['supervisor']['pss_bytes'] or 0) / MIB:>9.1f}")

    ready_s = statistics.median(run[0] for run in runs)
    idle_pss_mib = statistics.median(run[1]["pss_bytes"] / MIB for run in runs)
    print(f"\n{times.get('control', '?')} s of it: imports before the first fork, then the control plane")
    print(f"first start (new certificates and data): {first_s:.2f} s")
    print(f"ready: median {ready_s:.2f} s of {len(runs)}, bar {BAR_READY_S:g} s")
    print(f"idle memory: median {idle_pss_mib:.0f} MiB, bar {BAR_IDLE_PSS_MIB:g} MiB")
    print(json.dumps({"ready_s": round(ready_s, 3), "idle_pss_mib": round(idle_pss_mib, 1)}))


if __name__ == "__main__":
    main()
