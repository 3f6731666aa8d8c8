"""What callers see while the mesh is changed, broken and cut off: open-loop calls against real processes.

Three instances of a service, a control plane and a caller are processes of their own; the caller sends at
a fixed rate whatever happens. Then: rolling restarts without a retry to hide anything, kill -9 of an
instance, SIGSTOP of an instance, a backend that fails every call, more calls than the circuit breaker lets
through, a canary's share, the control plane away while another instance starts, certificates of a few
seconds. And with a real Consul agent: intentions changed, and Consul and the control plane away together.

The last line is one JSON object: {"rolling_failed": 0, "kill_failed": 0, "rotation_failed": 0,
"outage_failed": 0, "retry_amplification": at most 1.2, "canary_error_points": at most 2}. `--mode short`
takes about three minutes; `--only` names parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import _rolling_faults as faults
from benchmarks._rolling_world import World, failed, total
from tests.servers.consul import ConsulAgent
from tests.servers.programs import CONSUL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks._rolling_faults import Outage
    from benchmarks._rolling_world import Seen

BAR_AMPLIFICATION = 1.2
BAR_CANARY_POINTS = 2.0
BAR_STOP_S = 10.0
BAR_INTENTION_S = 1.0
ROTATION_S = 5.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much of each thing is done."""

    rounds: int
    kills: int
    stop_s: int
    failing_s: float
    canary_calls: int
    outage_s: float
    rotation_s: float
    intentions: int


MODES = {
    "full": Lengths(20, 10, 15, 30, 10_000, 120, 120, 20),
    "short": Lengths(2, 2, 15, 10, 2000, 15, 20, 5),
    "smoke": Lengths(1, 1, 2, 1, 200, 2, 2, 1),
}


def row(name: str, value: str, bar: str = "") -> None:
    """One line of the table, as soon as it is known."""
    print(f"{name:<52} {value:>26}   {bar}", flush=True)


def show(name: str, seen: Seen) -> int:
    """The failures among calls, with their texts."""
    row(name, f"{failed(seen)} of {total(seen)} failed", "0")
    for text, count in sorted(seen.items()):
        if ": " in text:
            print(f"    {count} x {text}")
    return failed(seen)


class Report:
    """Runs the parts and keeps their figures."""

    def __init__(self, folder: Path, lengths: Lengths, rate: float) -> None:
        self._folder = folder
        self._lengths = lengths
        self._rate = rate
        self.figures: dict[str, float] = {}

    async def local(self, parts: set[str]) -> None:
        """The parts that need no Consul, in one mesh."""
        ways: dict[str, Callable[[World], Awaitable[None]]] = {
            "rolling": self._rolling,
            "kill": self._kill,
            "stop": self._stop,
            "failing": self._failing,
            "canary": self._canary,
            "outage": self._outage,
        }
        chosen = [way for name, way in ways.items() if name in parts]
        if chosen:
            async with World(self._folder / "local") as world:
                for way in chosen:
                    await way(world)

    async def _rolling(self, world: World) -> None:
        seen = await faults.rolling(world, self._rate, self._lengths.rounds)
        name = f"{self._lengths.rounds} rolling restarts of three, no retries"
        self.figures["rolling_failed"] = show(name, seen)

    async def _kill(self, world: World) -> None:
        seen = await faults.killed(world, self._rate, self._lengths.kills)
        self.figures["kill_failed"] = show(f"{self._lengths.kills} x kill -9 of one of three", seen)

    async def _stop(self, world: World) -> None:
        found = await faults.stopped(world, self._rate, self._lengths.stop_s)
        row("SIGSTOP of one of three: p99 normal again after", f"{found.back_s:.0f} s", f"{BAR_STOP_S:g} s")
        row("    p99 before", f"{found.normal_s * 1e3:.1f} ms")
        print("    p99 of each second after, ms:", *(f"{value * 1e3:.0f}" for value in found.seconds))
        await world.until_all(faults.THREE)

    async def _failing(self, world: World) -> None:
        amplification = await faults.dead_backend(world, self._rate / 2, self._lengths.failing_s)
        self.figures["retry_amplification"] = round(amplification, 3)
        row("attempts a call when every call fails", f"{amplification:.3f}", f"{BAR_AMPLIFICATION:g}")
        passed, shed = await faults.breaker(world)
        row(
            f"circuit breaker at {faults.BREAKER}",
            f"{passed} passed, {shed} shed",
            f"{faults.BREAKER} passed",
        )

    async def _canary(self, world: World) -> None:
        points = await faults.canary(world, self._lengths.canary_calls)
        self.figures["canary_error_points"] = round(points, 2)
        row("canary at 10 %, off by", f"{points:.2f} points", f"{BAR_CANARY_POINTS:g}")

    async def _outage(self, world: World) -> None:
        found = await faults.outage(world, self._rate, self._lengths.outage_s)
        self._show_outage("control plane away", found)

    def _show_outage(self, what: str, found: Outage) -> None:
        count = show(f"{what} for {self._lengths.outage_s:g} s", found.seen)
        self.figures["outage_failed"] = self.figures.get("outage_failed", 0) + count
        row("    an instance started meanwhile waited for", found.waited_for)
        row("    and served after", f"{found.joined_s:.1f} s")

    async def consul(self) -> None:
        """Intentions and the outage of everything, with a real agent."""
        agent = ConsulAgent(CONSUL.provide(), self._folder)
        async with World(self._folder / "consul", consul=agent) as world:
            median, worst = await faults.intention(world, agent, self._lengths.intentions)
            row("intention changed in Consul, obeyed after (median)", f"{median * 1e3:.0f} ms")
            row("    the slowest", f"{worst * 1e3:.0f} ms", f"{BAR_INTENTION_S:g} s")
            found = await faults.outage(world, self._rate, self._lengths.outage_s, agent)
            self._show_outage("Consul and control plane away", found)

    async def rotation(self) -> None:
        """Certificates of a few seconds."""
        seconds = self._lengths.rotation_s
        seen = await faults.rotation(self._folder / "rotation", self._rate, seconds, ROTATION_S)
        name = f"certificates renewed every {ROTATION_S:g} s for {seconds:g} s"
        self.figures["rotation_failed"] = show(name, seen)


PARTS = ("rolling", "kill", "stop", "failing", "canary", "outage", "consul", "rotation")


async def drive(options: argparse.Namespace) -> dict[str, float]:
    """Everything chosen, one after the other."""
    parts = set(options.only or PARTS)
    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
        report = Report(Path(folder), MODES[options.mode], options.rate)
        await report.local(parts)
        if "consul" in parts:
            await report.consul()
        if "rotation" in parts:
            await report.rotation()
        return report.figures


def main() -> None:
    """Drive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=MODES, default="full", help="how much is done")
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="parts; default: all")
    print(json.dumps(asyncio.run(drive(parser.parse_args()))))


if __name__ == "__main__":
    main()
