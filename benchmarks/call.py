"""Calls: a unary call through plexus.client, mTLS and the whole pipeline, against a bare grpc.aio call.

Client, meshed server, bare server and control plane are processes of their own; the meshed server is
services.runtime.service.serve, as every service runs. Both servers answer the same message with the same
handler; rounds of the two alternate, so that whatever else the machine does falls on both.

The last line is one JSON object: {"p50_ratio_c1": …, "p99_ratio_c1": …, "rate_ratio_c32": …}, the meshed
figure over the bare one. Bars: p50 at most 1.3, calls per second at concurrency 32 at least 0.6.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from plexus.client.channel import Mesh
from plexus.vectors.v1 import vectors_pb2, vectors_pb2_grpc
from services.mesh import main as control_plane
from services.runtime.config import TelemetryConfig
from services.runtime.service import Service, ServiceRuntime, join_mesh, serve
from services.runtime.telemetry import configure_logging
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack

BAR_P50_RATIO = 1.3
BAR_RATE_RATIO = 0.6
MANY = 32
READY_S = 60.0
SERVICE = "plexus.vectors.v1.VectorsService"
REQUEST = vectors_pb2.CountPointsRequest(collection="bench")


async def count_points(_request: vectors_pb2.CountPointsRequest, _context: Any) -> Any:
    """Answer at once: what is measured is the way."""
    return vectors_pb2.CountPointsResponse(count=1000)


def add_to(server: grpc.aio.Server) -> None:
    """Serve that one method, under its own name."""
    handler: Any = grpc.unary_unary_rpc_method_handler(
        count_points,
        request_deserializer=vectors_pb2.CountPointsRequest.FromString,
        response_serializer=vectors_pb2.CountPointsResponse.SerializeToString,
    )
    methods = grpc.method_handlers_generic_handler(SERVICE, {"CountPoints": handler})
    server.add_generic_rpc_handlers((methods,))


# The servers.


def stop_event() -> asyncio.Event:
    """Set by SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def run_control(state: Path, port: int) -> None:
    """Run the control plane."""
    await control_plane.serve(state, port, lambda: print("ready", flush=True), stop_event())


async def run_meshed(state: Path, port: int) -> None:
    """Run the handler as a service is run."""

    async def compose(runtime: ServiceRuntime, _stack: AsyncExitStack) -> None:
        add_to(runtime.server)

    service = Service("vectors", compose, (SERVICE,))
    await serve(
        service,
        state_dir=state,
        control_port=port,
        ready=lambda: print("ready", flush=True),
        stop=stop_event(),
    )


async def run_bare(_state: Path, _port: int) -> None:
    """Run the handler with what grpc.aio is without anything."""
    server = grpc.aio.server()
    add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await stop_event().wait()
    await server.stop(1)


ROLES = {"control": run_control, "meshed": run_meshed, "bare": run_bare}


@contextmanager
def process(role: str, state: Path, port: int) -> Iterator[str]:
    """A server in a process of its own; gives the line it says when it is ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
    env["PLEXUS_TELEMETRY__LOG_LEVEL"] = "warning"
    command = [sys.executable, __file__, "--role", role, "--state", str(state), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:  # noqa: S603 - this file
        try:
            assert child.stdout is not None
            line = child.stdout.readline().strip()
            if not line:
                sys.exit(f"the {role} server did not start")
            yield line
        finally:
            child.terminate()
            try:
                child.wait(READY_S)
            except subprocess.TimeoutExpired:
                child.kill()


# The client.


class Way:
    """One way to call, and what was measured of it."""

    def __init__(self, name: str, call: Any) -> None:
        self.name = name
        self._call = call
        self.latencies: dict[int, list[float]] = {1: [], MANY: []}
        self.rates: dict[int, list[float]] = {1: [], MANY: []}

    async def round(self, concurrency: int, calls: int, *, keep: bool = True) -> None:
        """Make calls, so many at once, each caller waiting for its answer."""
        call, latencies = self._call, []

        async def caller() -> None:
            for _ in range(calls // concurrency):
                began = time.perf_counter()
                await call(REQUEST)
                latencies.append(time.perf_counter() - began)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(caller())
        took = time.perf_counter() - began
        if keep:
            self.latencies[concurrency] += latencies
            self.rates[concurrency].append(len(latencies) / took)

    def quantile(self, concurrency: int, share: float) -> float:
        """A quantile of the latencies, in milliseconds."""
        ordered = sorted(self.latencies[concurrency])
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def rate(self, concurrency: int) -> float:
        """Calls per second, the median of the rounds."""
        return statistics.median(self.rates[concurrency])


async def measure(bare_port: int, rounds: int, calls: int) -> tuple[Way, Way]:
    """Alternate rounds of both ways."""
    async with Mesh() as mesh, grpc.aio.insecure_channel(f"127.0.0.1:{bare_port}") as channel:
        meshed = Way("meshed", mesh.stub(vectors_pb2_grpc.VectorsServiceStub).CountPoints)
        bare = Way("bare", vectors_pb2_grpc.VectorsServiceStub(channel).CountPoints)
        for way in (bare, meshed):  # connections and caches
            await way.round(1, min(calls, 200), keep=False)
            await way.round(MANY, min(calls, 640), keep=False)
        for number in range(rounds):
            order = (bare, meshed) if number % 2 == 0 else (meshed, bare)
            for concurrency, share in ((1, 1), (MANY, 4)):
                for way in order:
                    await way.round(concurrency, share * calls)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        return bare, meshed


def report(bare: Way, meshed: Way) -> dict[str, float]:
    """Print the table; the ratios."""
    print(f"\n{'':<8}{'at once':>8}{'p50 ms':>9}{'p99 ms':>9}{'calls/s':>9}")
    for concurrency in (1, MANY):
        for way in (bare, meshed):
            print(
                f"{way.name:<8}{concurrency:>8}{way.quantile(concurrency, 0.5):>9.3f}"
                f"{way.quantile(concurrency, 0.99):>9.3f}{way.rate(concurrency):>9.0f}"
            )
    ratios = {
        "p50_ratio_c1": round(meshed.quantile(1, 0.5) / bare.quantile(1, 0.5), 3),
        "p99_ratio_c1": round(meshed.quantile(1, 0.99) / bare.quantile(1, 0.99), 3),
        "rate_ratio_c32": round(meshed.rate(MANY) / bare.rate(MANY), 3),
    }
    print(f"\np50, one at a time: {ratios['p50_ratio_c1']:.2f} of bare, bar at most {BAR_P50_RATIO:g}")
    print(f"calls/s, {MANY} at once: {ratios['rate_ratio_c32']:.2f} of bare, bar at least {BAR_RATE_RATIO:g}")
    return ratios


def main() -> None:
    """Start the servers, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each way")
    parser.add_argument("--calls", type=int, default=800, help="calls of a round; four times as many at 32")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure_logging(options.role or "client", TelemetryConfig(log_level="warning"))
    if options.role:
        asyncio.run(ROLES[options.role](options.state, options.port))
        return
    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
        state, port = Path(folder), free_port()
        with (
            process("control", state, port),
            process("meshed", state, port),
            process("bare", state, port) as at,
        ):
            join_mesh("cli", state, port, 3600)
            bare, meshed = asyncio.run(measure(int(at), options.rounds, max(options.calls, MANY)))
    print(json.dumps(report(bare, meshed)))


if __name__ == "__main__":
    main()
