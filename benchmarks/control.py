"""Control plane: from the change of one endpoint to the last acknowledgement, with 1,000 connected clients.

The control plane (registry, policies, ADS over mTLS) is one process, the clients are another: 1,000
streams, half of them subscribed to 20 services each, the other half to two; one service is used by all of
them. Two changes are measured: of an endpoint of that shared service, which goes to all clients, and of any
other service, which goes to about ten. A small and a large catalogue are beside: the cost follows the
change.

The last line is one JSON object, of the shared service at 1,000 services x 1,000 clients: {"ack_p50_s": …,
"ack_p99_s": …, "idle_cpu_percent": …, "rss_mib": …}. Bars: p99 1 s, idle CPU 2 %, two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from plexus.xds.v1 import xds_pb2
from services.mesh import main as control_plane
from services.mesh.ads import servicer
from services.mesh.ads.client import RESPONSE_BYTES
from services.mesh.ads.hub import Hub
from services.mesh.plane import Plane
from services.mesh.registry.domain import Instance
from services.mesh.registry.local import LocalRegistry
from services.mesh.trust.local import LocalCertificateSource
from services.mesh.xds.resources import CLUSTER, ENDPOINT, LISTENER, ROUTE, route_name
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.credentials import server_credentials
from services.runtime.pipeline import Pipeline

BAR_ACK_P99_S = 1.0
BAR_IDLE_CPU_PERCENT = 2.0
SHARED = "service-0"
SUBSCRIPTIONS = 20
INSTANCES = 10
LEASE_S = 600.0
PATIENCE_S = 120.0
KINDS = (LISTENER, ROUTE, CLUSTER, ENDPOINT)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured with one catalogue."""

    services: int
    clients: int
    connect_s: float
    shared_p50_s: float
    shared_p99_s: float
    shared_cpu_s: float
    shared_bytes: float
    single_p50_s: float
    single_p99_s: float
    single_cpu_s: float
    single_bytes: float
    idle_cpu_percent: float
    rss_mib: float


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cpu_s() -> float:
    """CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def sent_bytes() -> float:
    """Bytes of all responses so far."""
    return sum(
        sample.value
        for metric in RESPONSE_BYTES.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


class Bench:
    """The control plane under measurement."""

    def __init__(self, state: Path, services: int, clients: int) -> None:
        self._state = state
        self._services = services
        self._clients = clients
        self._hub = Hub()
        self._plane = Plane(self._hub)
        self._ports = iter(range(20_000, 60_000))
        self._random = random.Random(1)  # noqa: S311 - repeatable

    async def run(self, changes: int, idle_s: float) -> Row:
        """Fill, connect, measure."""
        identity = LocalCertificateSource(self._state, "control", 3600).ensure()
        LocalCertificateSource(self._state, "cli", 3600).ensure()
        limits = ServerConfig(max_concurrent_calls=100_000)
        server = grpc.aio.server(interceptors=[Pipeline("control", limits, AllowAll())])
        servicer.add_to_server(self._hub, server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(identity))
        catalogue = self._state / "catalogue.json"
        async with LocalRegistry(catalogue, max_instances=self._services * INSTANCES) as registry:
            await self._fill(registry)
            following = asyncio.create_task(control_plane.follow_catalogue(registry, self._plane))
            while len(self._plane.services()) < self._services:  # noqa: ASYNC110 - no one tells
                await asyncio.sleep(0.01)
            await server.start()
            started = time.monotonic()
            command = [sys.executable, __file__, "--connect", str(port), "--state", str(self._state)]
            command += ["--services", str(self._services), "--clients", str(self._clients)]
            clients = await asyncio.create_subprocess_exec(*command)
            try:
                await self._settled(clients)
                connect_s = time.monotonic() - started
                await asyncio.sleep(2)
                began, used = time.monotonic(), cpu_s()
                await asyncio.sleep(idle_s)
                idle = 100 * (cpu_s() - used) / (time.monotonic() - began)
                shared = await self._measure(registry, changes, [SHARED])
                others = [f"service-{number}" for number in range(1, self._services)]
                followed = [name for name in others if self._hub.followers(ENDPOINT, name)]
                single = await self._measure(registry, changes, followed)
            finally:
                clients.kill()
                await clients.wait()
                following.cancel()
                await server.stop(None)
        return Row(
            self._services,
            self._clients,
            connect_s,
            *shared,
            *single,
            idle_cpu_percent=idle,
            rss_mib=rss_mib(),
        )

    async def _fill(self, registry: LocalRegistry) -> None:
        for service in range(self._services):
            for number in range(INSTANCES):
                await registry.register(self._instance(f"service-{service}", number), lease_s=LEASE_S)

    def _instance(self, service: str, number: int, port: int = 0) -> Instance:
        number_of = int(service.rpartition("-")[2])
        address = f"10.{number_of // 256}.{number_of % 256}.{number + 1}"
        return Instance(
            id=f"{service}-{number}", service=service, address=address, port=port or 4000, version="1.0"
        )

    async def _settled(self, clients: asyncio.subprocess.Process) -> None:
        """Wait until every client has acknowledged everything it asked for."""
        deadline = time.monotonic() + PATIENCE_S
        wanted = self._clients * len(KINDS)
        while True:
            subscriptions = [
                subscription
                for client in self._hub.clients
                for subscription in client.subscriptions.values()
                if subscription.names and subscription.acked.keys() == subscription.names
            ]
            if len(subscriptions) == wanted:
                return
            if clients.returncode is not None or time.monotonic() > deadline:
                sys.exit(f"only {len(subscriptions)} of {wanted} subscriptions are served")
            await asyncio.sleep(0.05)

    async def _measure(
        self, registry: LocalRegistry, changes: int, services: list[str]
    ) -> tuple[float, float, float, float]:
        """Change an endpoint and wait for the last acknowledgement, several times.

        Returns:
            p50 and p99 in seconds, CPU seconds and bytes per change.
        """
        times = []
        used, sent = cpu_s(), sent_bytes()
        for _ in range(changes):
            service = self._random.choice(services)
            followers = self._hub.followers(ENDPOINT, service)
            began = time.monotonic()
            moved = self._instance(service, self._random.randrange(INSTANCES), next(self._ports))
            before = self._hub.revision
            await registry.register(moved, lease_s=LEASE_S)
            while self._hub.revision == before:  # noqa: ASYNC110 - no one tells
                await asyncio.sleep(0.001)
            made = self._hub.get(ENDPOINT, service)
            assert made is not None
            waiting, version = list(followers), made.body.version
            while True:
                # Only the last of them is looked at until it has: looking is not to cost what is measured.
                while waiting and waiting[-1].subscriptions[ENDPOINT].acked.get(service) == version:
                    waiting.pop()
                if not waiting:
                    break
                if time.monotonic() - began > PATIENCE_S:
                    sys.exit(f"{len(waiting)} clients have not acknowledged")
                await asyncio.sleep(0.002)
            times.append(time.monotonic() - began)
        return (
            statistics.median(times),
            percentile(times, 0.99),
            (cpu_s() - used) / changes,
            (sent_bytes() - sent) / changes,
        )


async def connect(port: int, state: Path, services: int, clients: int) -> None:
    """The clients: streams that acknowledge whatever comes."""
    identity = LocalCertificateSource(state, "cli", 3600).ensure()
    credentials = grpc.ssl_channel_credentials(
        identity.ca_path.read_bytes(), identity.key_path.read_bytes(), identity.cert_path.read_bytes()
    )
    chooser = random.Random(2)  # noqa: S311 - repeatable
    await asyncio.gather(
        *(
            _client(
                port,
                credentials,
                f"client-{number}",
                sorted(
                    {SHARED}
                    | {
                        f"service-{chooser.randrange(1, services)}"
                        for _ in range(SUBSCRIPTIONS - 1 if number % 2 else 1)
                    }
                ),
            )
            for number in range(clients)
        )
    )


async def _client(port: int, credentials: grpc.ChannelCredentials, node: str, services: list[str]) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        open_stream: Any = channel.stream_stream(
            f"/{servicer.SERVICE}/{servicer.METHOD}",
            request_serializer=xds_pb2.DiscoveryRequest.SerializeToString,
            response_deserializer=xds_pb2.DiscoveryResponse.FromString,
        )
        stream = open_stream()
        names = dict.fromkeys(KINDS, services) | {ROUTE: [route_name(name) for name in services]}
        for kind in KINDS:
            await stream.write(
                xds_pb2.DiscoveryRequest(
                    node=xds_pb2.Node(id=node), type_url=kind, resource_names=names[kind]
                )
            )
        async for response in stream:
            await stream.write(
                xds_pb2.DiscoveryRequest(
                    version_info=response.version_info,
                    type_url=response.type_url,
                    resource_names=names[response.type_url],
                    response_nonce=response.nonce,
                )
            )


def measure(services: int, clients: int, changes: int, idle_s: float) -> Row:
    """One catalogue, in a process of its own."""
    import subprocess  # noqa: PLC0415 - only here

    command = [sys.executable, __file__, "--measure", "--services", str(services), "--clients", str(clients)]
    command += ["--changes", str(changes), "--idle-s", str(idle_s)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each catalogue and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=100, help="of each kind")
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--connect", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))

    if options.connect:
        asyncio.run(connect(options.connect, options.state, options.services[0], options.clients))
        return
    if options.measure:
        with tempfile.TemporaryDirectory(prefix="plexus-bench-") as state:
            bench = Bench(Path(state), options.services[0], options.clients)
            row = asyncio.run(bench.run(options.changes, options.idle_s))
        print(json.dumps(asdict(row)))
        return

    rows = []
    for services in options.services:
        print(f"{services} services x {INSTANCES}, {options.clients} clients…", file=sys.stderr)
        rows.append(measure(services, options.clients, options.changes, options.idle_s))
    print(f"\n{'':>9} | change seen by all clients            | change seen by those of one service   |")
    print(
        f"{'services':>9} | {'p50 s':>7} {'p99 s':>7} {'CPU ms':>8} {'KiB':>8}    "
        f"| {'p50 s':>7} {'p99 s':>7} {'CPU ms':>8} {'KiB':>8}    "
        f"| {'idle CPU %':>10} {'RSS MiB':>8} {'connect s':>9}"
    )
    for row in rows:
        print(
            f"{row.services:>9} "
            f"| {row.shared_p50_s:>7.3f} {row.shared_p99_s:>7.3f} {row.shared_cpu_s * 1000:>8.1f} "
            f"{row.shared_bytes / 1024:>8.1f}    "
            f"| {row.single_p50_s:>7.3f} {row.single_p99_s:>7.3f} {row.single_cpu_s * 1000:>8.1f} "
            f"{row.single_bytes / 1024:>8.1f}    "
            f"| {row.idle_cpu_percent:>10.2f} {row.rss_mib:>8.0f} {row.connect_s:>9.1f}"
        )
    shown = next((row for row in rows if row.services == 1000), rows[-1])
    print(f"\nbars: p99 {BAR_ACK_P99_S:g} s, idle CPU {BAR_IDLE_CPU_PERCENT:g} %")
    print(
        json.dumps(
            {
                "ack_p50_s": round(shown.shared_p50_s, 4),
                "ack_p99_s": round(shown.shared_p99_s, 4),
                "idle_cpu_percent": round(shown.idle_cpu_percent, 2),
                "rss_mib": round(shown.rss_mib, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
