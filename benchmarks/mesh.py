"""The mesh's price: what a 1 KB call costs more than a bare one, through Plexus and through sidecars.

The same open-loop caller sends at a fixed rate to the same echo over five paths, round after round:

* direct: bare grpc.aio on both ends, no TLS, no telemetry; and once more, so that the difference of two
  equal things shows the noise;
* plexus: xDS, mTLS, intentions, metrics, request ids and trace context, through plexus.client and
  services.runtime, as every service runs;
* envoy: the bare ends with an Envoy beside each, mTLS 1.3 between them, an authorization rule, retries,
  per-method statistics, HTTP/2 connections kept, no access log;
* daprd: the bare ends with a daprd beside each, mTLS by sentry, an access rule, gRPC proxying, no tracing.

A latency counts from the moment at which the call was to be sent. What a path adds is the difference of its
percentile to the direct one's in the same round; the figure is the median of all rounds.

The last line is one JSON object of the first rate: {"added_p50_ms": …, "added_p99_ms": …,
"sidecar_added_p50_ms": …, "sidecar_added_p99_ms": …, "ratio_p50": …, "ratio_p99": …}, sidecar being envoy.
Bars: both ratios at most 0.5, and no process more than the direct path has.

The caller is far from saturated at these rates; how busy it was and how late it sent is in the table. On a
machine that does something else, `chrt -f 1 make bench-mesh` keeps that out of the figures of all paths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._mesh_sidecars import SERVER, daprds, envoys
from benchmarks._processes import Processes
from tests.ports import free_port
from tests.servers.programs import UnavailableServerError

if TYPE_CHECKING:
    from benchmarks._processes import Process

BAR_RATIO = 0.5
WARM_S = 0.5
SHARES = (0.5, 0.9, 0.99)
HERE = Path(__file__).resolve().parent
DIRECT, AGAIN, PLEXUS, ENVOY, DAPRD = "direct", "direct again", "plexus", "envoy", "daprd"


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of a path was.

    Attributes:
        quantiles: Milliseconds, by share.
        late_p99: Milliseconds by which the caller itself sent late.
        cpu_s: CPU seconds by process.
        wall_s: Length.
        calls: How many were answered.
        failed: How many were not.
    """

    quantiles: dict[float, float]
    late_p99: float
    cpu_s: dict[str, float]
    wall_s: float
    calls: int
    failed: int


@dataclass(slots=True)
class Way:
    """One path: its processes, the caller first, and its rounds by rate."""

    name: str
    processes: tuple[Process, ...]
    rounds: dict[float, list[Round]] = field(default_factory=dict)

    async def ready(self) -> None:
        """Wait until the whole path answers."""
        failure = await self.processes[0].ask("ready")
        if failure:
            sys.exit(f"{self.name}: {failure}")

    async def round(self, rate: float, seconds: float) -> None:
        """Measure once."""
        await self.processes[0].ask("run", rate=rate, seconds=WARM_S)
        used = {process.name: process.cpu_s() for process in self.processes}
        began = time.monotonic()
        answer = await self.processes[0].ask("run", rate=rate, seconds=seconds)
        wall_s = time.monotonic() - began
        latencies, late = sorted(answer["latencies"]), sorted(answer["late"])
        if not latencies:
            sys.exit(f"{self.name}: {answer['failures']}")
        for text, count in answer["failures"].items():
            print(f"{self.name}: {count} x {text}", file=sys.stderr)
        made = Round(
            quantiles={share: 1000 * percentile(latencies, share) for share in SHARES},
            late_p99=1000 * percentile(late, 0.99),
            cpu_s={process.name: process.cpu_s() - used[process.name] for process in self.processes},
            wall_s=wall_s,
            calls=len(latencies),
            failed=sum(answer["failures"].values()),
        )
        self.rounds.setdefault(rate, []).append(made)

    def added(self, direct: Way, rate: float, share: float) -> tuple[float, float, float]:
        """Milliseconds more than the direct path: the median of the rounds, and their quartiles."""
        pairs = zip(self.rounds[rate], direct.rounds[rate], strict=True)
        each = [mine.quantiles[share] - bare.quantiles[share] for mine, bare in pairs]
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        return middle, low, high

    def median(self, rate: float, share: float) -> float:
        """The median round's percentile, in milliseconds."""
        return statistics.median(each.quantiles[share] for each in self.rounds[rate])

    def cpu_ms(self, rate: float, process: str | None = None) -> float:
        """CPU milliseconds for 1,000 calls, of one process or of all."""
        rounds = self.rounds[rate]
        used = sum(s for each in rounds for name, s in each.cpu_s.items() if process in {None, name})
        return 1e6 * used / sum(each.calls for each in rounds)


async def direct(processes: Processes, name: str) -> tuple[Way, int]:
    """A bare server with a bare caller, and the server's port."""
    server, said = await processes.python(f"{name} server", HERE / "_mesh_bare.py")
    caller = await bare_caller(processes, name, said["port"])
    return Way(name, (caller, server)), said["port"]


async def bare_caller(processes: Processes, name: str, port: int, *metadata: str) -> Process:
    """The caller of a path that needs nothing of Plexus."""
    command: tuple[str | Path, ...] = (HERE / "_mesh_bare.py", "--call", str(port), "--metadata", *metadata)
    caller, _ = await processes.python(f"{name} caller", *command)
    return caller


async def plexus(processes: Processes) -> tuple[Way, Process]:
    """The path through Plexus, and the control plane, which is not on it."""
    program, state = HERE / "_mesh_plexus.py", processes.folder / "plexus"
    options: tuple[str | Path, ...] = ("--state", state, "--port", str(free_port()))
    control, _ = await processes.python("control plane", program, "control", *options)
    server, _ = await processes.python(
        "plexus server", program, "serve", *options, PLEXUS_TELEMETRY__LOG_LEVEL="warning"
    )
    caller, _ = await processes.python("plexus caller", program, "call", *options)
    return Way(PLEXUS, (caller, server)), control


async def start(processes: Processes, names: list[str], workers: int) -> tuple[list[Way], list[str]]:
    """The paths, the direct one first, and remarks about them."""
    remarks = []
    bare, app = await direct(processes, DIRECT)
    ways = [bare]
    if AGAIN in names:
        ways.append((await direct(processes, AGAIN))[0])
    if PLEXUS in names:
        way, control = await plexus(processes)
        ways.append(way)
        await way.ready()
        remarks.append(f"Plexus' control plane, off the path: {control.pss_mib():.0f} MiB")
    if ENVOY in names:
        entry, sidecars = await envoys(processes, app, workers)
        caller = await bare_caller(processes, ENVOY, entry)
        ways.append(Way(ENVOY, (caller, bare.processes[1], *sidecars)))
        remarks.append(f"Envoy's worker threads: {workers} each")
    if DAPRD in names:
        try:
            entry, sidecars = await daprds(processes, app)
        except UnavailableServerError as error:
            remarks.append(f"daprd: not built ({error})")
        else:
            caller = await bare_caller(processes, DAPRD, entry, f"dapr-app-id={SERVER}")
            ways.append(Way(DAPRD, (caller, bare.processes[1], *sidecars)))
    for way in ways:
        await way.ready()
    return ways, remarks


async def drive(options: argparse.Namespace) -> dict[str, float | None]:
    """Start all paths, measure, report."""
    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
        async with Processes(Path(folder)) as processes:
            ways, remarks = await start(processes, options.paths, options.envoy_workers)
            for number in range(options.rounds):
                turned = ways[number % len(ways) :] + ways[: number % len(ways)]
                for rate in options.rates:
                    for way in turned:
                        await way.round(rate, options.seconds)
                print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            memory = {way.name: sum(process.pss_mib() for process in way.processes) for way in ways}
    for rate in options.rates:
        show(ways, rate, memory)
    for remark in remarks:
        print(remark)
    return summary(ways, options.rates[0])


def show(ways: list[Way], rate: float, memory: dict[str, float]) -> None:
    """The table of one rate."""
    bare = ways[0]
    print(f"\n{rate:g} calls/s, {len(bare.rounds[rate])} rounds; milliseconds")
    print(
        f"{'':<13}{'p50':>7}{'p90':>7}{'p99':>7} |{'added p50 (quartiles)':>24}{'added p90':>11}"
        f"{'added p99 (quartiles)':>25} |{'CPU ms':>7}{'PSS MiB':>9}{'processes':>10}{'failed':>7}"
    )
    for way in ways:
        quantiles = "".join(f"{way.median(rate, share):>7.2f}" for share in SHARES)
        p50, p90, p99 = (way.added(bare, rate, share) for share in SHARES)
        more = (
            ""
            if way is bare
            else f"{p50[0]:>+8.3f} ({p50[1]:+.3f} to {p50[2]:+.3f}){p90[0]:>+9.3f}"
            f"{p99[0]:>+9.3f} ({p99[1]:+.3f} to {p99[2]:+.3f})"
        )
        failed = sum(each.failed for each in way.rounds[rate])
        print(
            f"{way.name:<13}{quantiles} |{more:<60} |{way.cpu_ms(rate):>7.0f}{memory[way.name]:>9.0f}"
            f"{len(way.processes):>10}{failed:>7}"
        )
    print("CPU ms for 1,000 calls, by process:")
    for way in ways:
        parts = [f"{each.name} {way.cpu_ms(rate, each.name):.0f}" for each in way.processes]
        busy = max(round_.cpu_s[way.processes[0].name] / round_.wall_s for round_ in way.rounds[rate])
        late = statistics.median(each.late_p99 for each in way.rounds[rate])
        print(
            f"  {', '.join(parts)}; the caller busy for at most {100 * busy:.0f} %, "
            f"p99 sent {late:.2f} ms late"
        )


def summary(ways: list[Way], rate: float) -> dict[str, float | None]:
    """The figures with bars; the ratio of something that adds nothing is not a number."""
    found = {way.name: way for way in ways}
    shares = {"p50": 0.5, "p99": 0.99}
    mine = {name: found[PLEXUS].added(ways[0], rate, share)[0] for name, share in shares.items()}
    theirs = {name: found[ENVOY].added(ways[0], rate, share)[0] for name, share in shares.items()}
    extra = len(found[PLEXUS].processes) - len(ways[0].processes)
    print(f"\nbars: ratios at most {BAR_RATIO:g}; processes more than the direct path: {extra}, bar 0")
    return {
        **{f"added_{name}_ms": round(value, 4) for name, value in mine.items()},
        **{f"sidecar_added_{name}_ms": round(value, 4) for name, value in theirs.items()},
        **{
            f"ratio_{name}": round(mine[name] / theirs[name], 3) if theirs[name] > 0 else None
            for name in shares
        },
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[400.0, 200.0], help="calls a second")
    # Every path is measured at every place of a round's order, twice, and the whole ends within four minutes.
    parser.add_argument("--rounds", type=int, default=10, help="of each path and rate")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round")
    everything = [AGAIN, PLEXUS, ENVOY, DAPRD]
    parser.add_argument(
        "--paths", nargs="+", choices=everything, default=everything, help="beside the direct one"
    )
    # One connection is one worker's: more only wait.
    parser.add_argument("--envoy-workers", type=int, default=1, help="threads of each Envoy")
    options = parser.parse_args()
    began = time.monotonic()
    figures = asyncio.run(drive(options))
    print(f"all of it took {time.monotonic() - began:.0f} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
