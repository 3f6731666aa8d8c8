"""All benchmarks, one after the other; with --record what they say becomes a dated file under results/."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def run(name: str) -> str:
    """Run a benchmark, showing its output as it comes; all of it."""
    lines = []
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:  # noqa: S603 - our own
        assert program.stdout is not None
        for line in program.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if program.returncode:
        sys.exit(f"{name} failed with exit code {program.returncode}")
    return "".join(lines).strip()


def machine() -> str:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - the one on PATH
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"Commit {commit.stdout.strip() or 'unknown'}; {cores} cores, {model or platform.machine()}; "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}."
    )


def main() -> None:
    """Run them; the last line is one JSON object with a key for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="benchmarks")
    parser.add_argument("--record", action="store_true", help="write results/DATE.md")
    options = parser.parse_args()
    said: dict[str, str] = {}
    for name in options.names:
        print(f"== {name}", flush=True)
        said[name] = run(name)
    results = {name: json.loads(text.splitlines()[-1]) for name, text in said.items()}
    if options.record:
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        path = FOLDER / "results" / f"{today}.md"
        path.parent.mkdir(exist_ok=True)
        parts = [f"# Benchmarks, {today}", machine()]
        parts += [f"## {name}\n\n```text\n{text}\n```" for name, text in said.items()]
        path.write_text("\n\n".join(parts) + "\n")
        print(f"written: {path.relative_to(FOLDER.parent)}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
