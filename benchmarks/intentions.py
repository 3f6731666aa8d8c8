"""Intentions: from a changed rule to the first call that is refused, and back, with Consul and without.

A caller calls a service through the mesh all the time, every few milliseconds. A rule is changed again and
again, from allow to deny and back: the file that holds it, or the entry in Consul. A time counts from before
the change is written to the first answer that shows it; it includes the caller's own way.

Changes come at random moments, about two a second; Consul is asked at most five times a second by each
follower, so that quicker changes would be seen as one.

The last line is one JSON object: {"files_p50_s": …, "files_p99_s": …, "consul_p50_s": …, "consul_p99_s": …}.
Bar: 1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import yaml

from benchmarks._mesh_plexus import IDENTITY, NAME
from benchmarks._processes import Processes
from services.runtime.config import project_file
from tests.ports import free_port
from tests.servers.consul import ConsulAgent
from tests.servers.programs import CONSUL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._processes import Process

BAR_S = 1.0
FILES, IN_CONSUL = "files", "consul"
PROGRAM = Path(__file__).resolve().parent / "_mesh_plexus.py"


def rules(action: str) -> dict[str, object]:
    """What the service is told about its caller."""
    return {"Kind": "service-intentions", "Name": NAME, "Sources": [{"Name": IDENTITY, "Action": action}]}


async def start(processes: Processes, state: Path, **variables: str) -> Process:
    """A control plane, a service and the caller of it."""
    options: tuple[str | Path, ...] = ("--state", state, "--port", str(free_port()))
    for role in ("control", "serve", "call"):
        process, _ = await processes.python(f"{state.name} {role}", PROGRAM, role, *options, **variables)
    await process.ask("until", denied=False)
    return process


async def measure(
    caller: Process, write: Callable[[str], Awaitable[None]], changes: int
) -> dict[str, list[float]]:
    """Change the rule there and back; seconds to the first answer that shows it, by what it says then."""
    chooser = random.Random(3)  # noqa: S311 - repeatable
    found: dict[str, list[float]] = {"deny": [], "allow": []}
    for number in range(2 * changes):
        action = "allow" if number % 2 else "deny"
        seen = asyncio.create_task(caller.ask("until", denied=action == "deny"))
        await asyncio.sleep(chooser.uniform(0.25, 0.75))
        began = time.monotonic()
        await write(action)
        found[action].append(await seen - began)
    return found


async def with_files(folder: Path, changes: int) -> dict[str, list[float]]:
    """The rules are files of a folder."""
    files = folder / "intentions"
    shutil.copytree(project_file("consul/intentions"), files)

    async def write(action: str) -> None:
        temporary = files / f".{NAME}"
        temporary.write_text(yaml.safe_dump(rules(action)))
        temporary.replace(files / f"{NAME}.yaml")

    async with Processes(folder) as processes:
        caller = await start(processes, folder / FILES, PLEXUS_MESH__INTENTIONS=str(files))
        return await measure(caller, write, changes)


async def with_consul(folder: Path, changes: int) -> dict[str, list[float]]:
    """The rules are an entry of Consul."""
    with ConsulAgent(CONSUL.provide(), folder / "agent") as agent:
        variables = {
            "PLEXUS_CONSUL__ADDRESS": agent.url,
            "PLEXUS_CONSUL__GRPC_ADDRESS": agent.grpc,
            "PLEXUS_CONSUL__CHECK_INTERVAL_S": "0.5",
        }
        async with (
            Processes(folder) as processes,
            httpx.AsyncClient(base_url=f"{agent.url}/v1", timeout=30) as http,
        ):

            async def write(action: str) -> None:
                (await http.put("/config", json=rules(action))).raise_for_status()

            caller = await start(processes, folder / IN_CONSUL, **variables)
            return await measure(caller, write, changes)


WHERE = {FILES: with_files, IN_CONSUL: with_consul}


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(options: argparse.Namespace) -> dict[str, float]:
    """Measure where the rules may be, and report."""
    report = {}
    print(
        f"{'rules in':<9}{'to':>6}{'changes':>9}{'p50 s':>8}{'p99 s':>8}{'longest s':>11}   bar {BAR_S:g} s"
    )
    for name in options.where:
        with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
            found = await WHERE[name](Path(folder), options.changes)
        for action, times in found.items():
            print(
                f"{name:<9}{action:>6}{len(times):>9}{statistics.median(times):>8.3f}"
                f"{percentile(times, 0.99):>8.3f}{max(times):>11.3f}"
            )
        both = [*found["deny"], *found["allow"]]
        report[f"{name}_p50_s"] = round(statistics.median(both), 4)
        report[f"{name}_p99_s"] = round(percentile(both, 0.99), 4)
    return report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=100, help="to a refusal, and as many back")
    parser.add_argument(
        "--where", nargs="+", choices=list(WHERE), default=list(WHERE), help="keeps the rules"
    )
    print(json.dumps(asyncio.run(drive(parser.parse_args()))))


if __name__ == "__main__":
    main()
