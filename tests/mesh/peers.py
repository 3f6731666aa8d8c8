"""Processes of the mesh tests (gRPC reads its xDS bootstrap once a process): control, server, client.

Each prints one JSON line once it is ready. A client then takes commands, one JSON line each, and answers each
with one line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from plexus.client.channel import Mesh
from services.mesh import main as control_plane
from services.mesh.registry.client import Registration, RemoteRegistry
from services.mesh.registry.domain import Instance
from services.runtime.config import TelemetryConfig
from services.runtime.credentials import server_credentials
from services.runtime.service import LEAVE_S, QUIET_S, join_mesh
from services.runtime.telemetry import configure_logging

TTL_S = 3600.0


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the protocol with the test


def stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def control(options: argparse.Namespace) -> None:
    await control_plane.serve(
        options.state, options.control, lambda: say(ready=options.control), stop_event()
    )


async def server(options: argparse.Namespace) -> None:
    """One instance; its identity is `service`. With --unregistered it only listens."""
    stop = stop_event()
    source, identity = join_mesh(options.service, options.state, options.control, options.ttl)
    rotation = asyncio.create_task(source.rotate(lambda _: None))
    called = -math.inf

    async def ask(_request: bytes, context: Any) -> bytes:
        nonlocal called
        called = time.monotonic()
        if options.failing:
            # Not set_code: grpc.aio then sends an empty message before the status, and a call that has had a
            # message is never retried.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as asked")
        return str(options.id).encode()

    handler: Any = grpc.unary_unary_rpc_method_handler(ask)
    listening = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    listening.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Ask": handler}),))
    port = listening.add_secure_port(f"127.0.0.1:{options.port}", server_credentials(identity))
    await listening.start()
    async with Mesh() as mesh:
        instance = Instance(id=options.id, service=options.service, address="127.0.0.1", port=port)
        registry = RemoteRegistry(mesh.channel("control"))
        registration = Registration(registry, instance, lease_s=options.lease)
        loops = [rotation]
        if not options.unregistered:
            loops.append(asyncio.create_task(registration.run()))
            await registration.registered.wait()
        say(ready=port)
        await stop.wait()
        for loop in loops:
            loop.cancel()
        if not options.unregistered:
            await registration.leave(identity)
            with contextlib.suppress(TimeoutError):  # as a service does: see services.runtime.service
                async with asyncio.timeout(LEAVE_S):
                    while (left_s := called + QUIET_S - time.monotonic()) > 0:  # noqa: ASYNC110 - it may move
                        await asyncio.sleep(left_s)
            await registration.deregister()
        await listening.stop(5)


class Caller:
    """Calls xds:///vectors."""

    def __init__(self, mesh: Mesh) -> None:
        self._ask = mesh.channel("vectors").unary_unary("/test.Who/Ask")
        self._registry = RemoteRegistry(mesh.channel("control"))
        self._going: list[asyncio.Task[None]] = []
        self._seen: Counter[str] = Counter()

    async def call(self, seen: Counter[str], timeout_s: float = 10) -> None:
        try:
            answer: bytes = await self._ask(b"", timeout=timeout_s)
            seen[answer.decode()] += 1
        except grpc.aio.AioRpcError as error:
            seen[f"{error.code().name}: {error.details()}"] += 1

    async def calls(self, count: int) -> Counter[str]:
        """Make calls one after the other; tell who answered or how they failed."""
        seen: Counter[str] = Counter()
        for _ in range(count):
            await self.call(seen)
        return seen

    async def until(self, names: list[str]) -> Counter[str]:
        """Call until a row of calls is answered by exactly these."""
        while sorted(seen := await self.calls(8 * len(names))) != sorted(names):
            pass  # each failed call has taken its retries' pauses
        return seen

    async def listed(self, names: list[str]) -> list[str]:
        """Wait until the registry knows exactly these."""
        async for instances in self._registry.watch("vectors"):
            if [entry.id for entry in instances] == names:
                break
        return names

    async def start(self, count: int) -> int:
        """Keep calling in the background, `count` at once."""
        self._seen = Counter()
        self._going = [asyncio.create_task(self._keep_calling()) for _ in range(count)]
        return count

    async def stop(self, _value: None) -> Counter[str]:
        """End that; tell who answered or how they failed."""
        for task in self._going:
            task.cancel()
        await asyncio.gather(*self._going, return_exceptions=True)
        return self._seen

    async def _keep_calling(self) -> None:
        while True:
            await self.call(self._seen)
            await asyncio.sleep(0.005)


async def client(options: argparse.Namespace) -> None:
    source, _ = join_mesh("cli", options.state, options.control, options.ttl)
    rotation = asyncio.create_task(source.rotate(lambda _: None))
    async with Mesh() as mesh:
        caller = Caller(mesh)
        say(ready=0)
        while line := await asyncio.to_thread(sys.stdin.readline):
            (item,) = json.loads(line).items()
            command, value = item
            say(result=await getattr(caller, command)(value))
    rotation.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["control", "server", "client"])
    parser.add_argument("state", type=Path)
    parser.add_argument("control", type=int)
    parser.add_argument("--service", default="vectors")
    parser.add_argument("--id", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--lease", type=float, default=10.0)
    parser.add_argument("--ttl", type=float, default=TTL_S)
    parser.add_argument("--failing", action="store_true")
    parser.add_argument("--unregistered", action="store_true")
    arguments = parser.parse_args()
    # The control plane does this itself. Standard output is for the protocol.
    configure_logging(arguments.role, TelemetryConfig(log_format="json"))
    role = {"control": control, "server": server, "client": client}[arguments.role]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(role(arguments))
