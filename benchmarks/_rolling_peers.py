"""The processes of the rolling benchmark: a control plane, an instance, and the caller.

Each prints a JSON line once it is ready; the caller then takes commands, one JSON line each, and answers each
with one line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from benchmarks._rolling_world import METHOD, NAME
from plexus.client.channel import Mesh
from services.mesh import main as control_plane
from services.mesh.membership import Membership
from services.runtime import telemetry
from services.runtime.config import Settings, TelemetryConfig
from services.runtime.errors import UnavailableError
from services.runtime.service import Service, ServiceRuntime, serve

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

CALL_S = 5.0
_ROW = 30
"""So many calls in a row that end alike show that no instance ends them in another way."""


def say(**message: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps(message), flush=True)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def run_control(state: Path, port: int, _number: int) -> None:
    """The control plane."""
    await control_plane.serve(state, port, lambda: say(ready=True), stop_event())


async def run_server(state: Path, port: int, number: int) -> None:
    """An instance: answers its number; fails a call that asks for it, and waits if asked to."""
    answer = str(number).encode()

    async def ask(_request: bytes, context: Any) -> bytes:
        headers = dict(context.invocation_metadata())
        if "x-fail" in headers:
            raise UnavailableError("as asked")
        if "x-wait" in headers:
            await asyncio.sleep(float(headers["x-wait"]))
        return answer

    async def compose(runtime: ServiceRuntime, _stack: AsyncExitStack) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(ask)
        handlers = grpc.method_handlers_generic_handler(METHOD, {"Ask": handler})
        runtime.server.add_generic_rpc_handlers((handlers,))

    service = Service(name=NAME, compose=compose, proto_services=(METHOD,), stateless=True)
    await serve(
        service,
        state_dir=state,
        control_port=port,
        ready=lambda: say(ready=True),
        stop=stop_event(),
        number=number,
    )


async def run_caller(state: Path, port: int, _number: int) -> None:
    """The caller: commands on standard input, one answer a line."""
    # Standard output is for answers.
    telemetry.configure_logging("caller", TelemetryConfig(log_format="json"))
    async with Membership("cli", state, Settings()) as member:
        await member.join()
        member.enter_xds(port)
        loops = [asyncio.create_task(loop, name=name) for name, loop in member.loops().items()]
        async with Mesh() as mesh:
            caller = Caller(mesh)
            say(ready=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                ((command, options),) = json.loads(line).items()
                say(answer=await getattr(caller, command)(**options))
        for loop in loops:
            loop.cancel()


class Caller:
    """Calls at a fixed rate, whatever the answers."""

    def __init__(self, mesh: Mesh) -> None:
        self._ask = mesh.channel(NAME).unary_unary(f"/{METHOD}/Ask")
        self._load: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._seen: Counter[str] = Counter()
        self._latency: list[tuple[float, float]] = []

    async def _call(self, headers: list[tuple[str, str]], timeout_s: float) -> None:
        started = time.monotonic()
        try:
            answer: bytes = await self._ask(b"", timeout=timeout_s, metadata=headers)
            self._seen[answer.decode()] += 1
        except grpc.aio.AioRpcError as error:
            self._seen[f"{error.code().name}: {(error.details() or '')[:80]}"] += 1
        self._latency.append((started, time.monotonic() - started))

    def _spawn(self, headers: list[tuple[str, str]], timeout_s: float) -> None:
        task = asyncio.create_task(self._call(headers, timeout_s))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _run(self, rate: float, headers: list[tuple[str, str]], timeout_s: float) -> None:
        due = time.monotonic()
        while True:
            now = time.monotonic()
            while due <= now:
                self._spawn(headers, timeout_s)
                due += 1 / rate
            await asyncio.sleep(max(0.0, due - now))

    async def start(
        self, rate: float, headers: dict[str, str] | None = None, timeout_s: float = CALL_S
    ) -> None:
        """Begin to call."""
        self._seen, self._latency = Counter(), []
        self._load = asyncio.create_task(self._run(rate, list((headers or {}).items()), timeout_s))

    async def stop(self) -> dict[str, Any]:
        """End; who answered or how calls failed, and how long each took."""
        if self._load is not None:
            self._load.cancel()
        await asyncio.gather(*self._calls)
        return {"seen": self._seen, "latency": self._latency}

    async def burst(self, count: int, at_once: int, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Make calls, some at once, as fast as they are answered."""
        self._seen, self._latency = Counter(), []
        metadata = list((headers or {}).items())
        left = count

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self._call(metadata, CALL_S * 4)

        await asyncio.gather(*(worker() for _ in range(at_once)))
        return {"seen": self._seen, "latency": self._latency}

    async def until(self, code: str) -> float:
        """Call until a row of calls ends with a code; when it began, on the machine's clock."""
        row: list[float] = []
        while len(row) < _ROW:
            began = time.monotonic()
            try:
                await self._ask(b"", timeout=CALL_S)
                ended = "OK"
            except grpc.aio.AioRpcError as error:
                ended = error.code().name
            row = [*row, began] if ended == code else []
        return row[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["control", "server", "caller"])
    parser.add_argument("state", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("number", type=int)
    arguments = parser.parse_args()
    role = {"control": run_control, "server": run_server, "caller": run_caller}[arguments.role]
    asyncio.run(role(arguments.state, arguments.port, arguments.number))
