"""What callers see while the mesh is changed, broken and cut off: open-loop calls against real processes.

Three instances of a service, a control plane and a caller are processes of their own; the caller sends at
a fixed rate whatever happens. Then: rolling restarts, kill -9 of an instance, SIGSTOP of an instance, a
backend that fails every call, more calls than the circuit breaker lets through, a canary's share,
certificates of a few seconds, and the control plane away while another instance starts.

The last line is one JSON object: {"rolling_failed": 0, "kill_failed": 0, "rotation_failed": 0,
"outage_failed": 0, "retry_amplification": at most 1.2, "canary_error_points": at most 2}. `--mode short`
takes about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from plexus.client.channel import Mesh
from services.cli.supervisor import rundir
from services.mesh import main as control_plane
from services.runtime import telemetry
from services.runtime.config import TelemetryConfig
from services.runtime.errors import UnavailableError
from services.runtime.service import Service, ServiceRuntime, join_mesh, serve

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

NAME = "vectors"
METHOD = "bench.Echo"
ANSWER_S = 120.0
CALL_S = 5.0
BAR_AMPLIFICATION = 1.2
BAR_CANARY_POINTS = 2.0
BAR_STOP_S = 10.0
BREAKER = 20
HANDLED = re.compile(
    r'^grpc_server_handled_total\{code="UNAVAILABLE",.*service="bench.*\} (\S+)$', re.MULTILINE
)


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


MODES = {
    "full": Lengths(20, 10, 15, 30, 10_000, 120, 120),
    "short": Lengths(2, 2, 15, 10, 2000, 15, 20),
    "smoke": Lengths(1, 1, 2, 1, 200, 2, 2),
}


def say(**message: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps(message), flush=True)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


# -- the processes -------------------------------------------------------------------------------------------


async def run_control(state: Path, port: int) -> None:
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


async def run_caller(state: Path, port: int) -> None:
    """The caller: commands on standard input, one answer a line."""
    telemetry.configure_logging(
        "caller", TelemetryConfig(log_format="json")
    )  # standard output is for answers
    source, _ = join_mesh("cli", state, port, float(os.environ["PLEXUS_MESH__CERTIFICATE_TTL_S"]))
    rotation = asyncio.create_task(source.rotate(lambda _identity: None))
    async with Mesh() as mesh:
        caller = Caller(mesh)
        say(ready=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            ((command, options),) = json.loads(line).items()
            say(answer=await getattr(caller, command)(**options))
    rotation.cancel()


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


# -- the driver ----------------------------------------------------------------------------------------------


class Peer:
    """One of the processes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def read(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        if not line:
            sys.exit("a process of the benchmark ended: see above")
        message: dict[str, Any] = json.loads(line)
        return message

    async def command(self, name: str, **options: Any) -> Any:
        """Have the caller do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({name: options}).encode() + b"\n")
        return (await self.read())["answer"]

    async def end(self, number: int) -> None:
        """Signal it and wait."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), ANSWER_S)


def failed(seen: dict[str, int]) -> int:
    """Calls that got no answer."""
    return sum(count for answer, count in seen.items() if ": " in answer)


def total(seen: dict[str, int]) -> int:
    """All calls."""
    return sum(seen.values())


class World:
    """A state folder and the processes around it."""

    def __init__(self, state: Path, *, ttl_s: float = 3600.0) -> None:
        self.state = state
        run_dir = rundir.RunDir(state)
        run_dir.create()
        self.port = rundir.control_port(run_dir)
        self.peers: list[Peer] = []
        self.policies = state / "policies"
        self.policies.mkdir(exist_ok=True)
        self.ttl_s = ttl_s
        self.log = (state / "processes.log").open("ab")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exit: object) -> None:
        for peer in self.peers:
            if peer.process.returncode is None:
                peer.process.kill()
                await peer.process.wait()
        self.log.close()

    async def start(self, role: str, number: int = 0, *, wait: bool = True, **variables: str) -> Peer:
        """Start a process and wait until it is ready."""
        environment = {
            **os.environ,
            "PLEXUS_MESH__POLICIES": str(self.policies),
            "PLEXUS_MESH__CERTIFICATE_TTL_S": str(self.ttl_s),
            "PLEXUS_TELEMETRY__LOG_FORMAT": "json",
            **variables,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--role", role, "--number", str(number)),
            *("--state", str(self.state), "--port", str(self.port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self.log,
            env=environment,
            limit=64 * 1024 * 1024,
        )
        peer = Peer(process)
        self.peers.append(peer)
        if wait:
            await peer.read()
        return peer

    def policy(self, text: str) -> None:
        """Put a policy in force."""
        temporary = self.policies / f".{NAME}"
        temporary.write_text(f"service: {NAME}\n{text}")
        temporary.replace(self.policies / f"{NAME}.yaml")

    def unavailable(self) -> float:
        """Attempts that the instances have failed."""
        catalogue = json.loads((self.state / "data/control/catalogue.json").read_text())["instances"]
        count = 0.0
        for instance in catalogue:
            if instance["service"] == NAME:
                with urllib.request.urlopen(f"http://{instance['meta']['metrics']}/metrics") as answer:
                    count += sum(map(float, HANDLED.findall(answer.read().decode())))
        return count


async def until_all(caller: Peer, names: set[str]) -> None:
    """Wait until exactly these answer."""
    deadline = time.monotonic() + ANSWER_S
    while set((await caller.command("burst", count=30, at_once=1))["seen"]) != names:
        if time.monotonic() > deadline:
            sys.exit(f"never answered by exactly {names}")


async def rolling(world: World, caller: Peer, rate: float, rounds: int) -> dict[str, int]:
    """Restart the instances one after the other."""
    servers = [peer for peer in world.peers if peer is not caller][1:4]
    await caller.command("start", rate=rate)
    for _ in range(rounds):
        for index in range(3):
            await servers[index].end(signal.SIGTERM)
            servers[index] = await world.start("server", index + 1)
    seen: dict[str, int] = (await caller.command("stop"))["seen"]
    return seen


async def killed(world: World, caller: Peer, rate: float, kills: int) -> dict[str, int]:
    """Kill -9 one of three, several times."""
    await caller.command("start", rate=rate)
    for _ in range(kills):
        victim = await world.start("server", 4)
        await asyncio.sleep(2)
        await victim.end(signal.SIGKILL)
        await asyncio.sleep(2)
    seen: dict[str, int] = (await caller.command("stop"))["seen"]
    return seen


async def stopped(world: World, caller: Peer, rate: float, stop_s: int) -> tuple[float, float, list[float]]:
    """SIGSTOP one; seconds until p99 is normal again, the normal one, and that of each second after."""
    victim = await world.start("server", 4)
    await until_all(caller, {"1", "2", "3", "4"})
    await caller.command("start", rate=rate, timeout_s=1.0)
    await asyncio.sleep(5)
    began = time.monotonic()
    victim.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(stop_s)
    latency = (await caller.command("stop"))["latency"]
    victim.process.send_signal(signal.SIGCONT)
    await victim.end(signal.SIGTERM)

    def p99(low: float, high: float) -> float:
        part = sorted(took for started, took in latency if low <= started < high)
        return part[int(0.99 * (len(part) - 1))] if part else 0.0

    normal = p99(began - 4, began)
    seconds = [p99(began + second, began + second + 1) for second in range(stop_s)]
    bound = max(5 * normal, 0.1)
    slow = [second for second, value in enumerate(seconds) if value > bound]
    return (max(slow) + 1 if slow else 0.0), normal, seconds


async def dead_backend(world: World, caller: Peer, rate: float, seconds: float) -> float:
    """Attempts for each call while every call fails."""
    before = world.unavailable()
    await caller.command("start", rate=rate, headers={"x-fail": "1"})
    await asyncio.sleep(seconds)
    seen = (await caller.command("stop"))["seen"]
    return (world.unavailable() - before) / total(seen)


async def breaker(world: World, caller: Peer) -> tuple[int, int]:
    """Calls let through and calls shed of three times as many as the breaker allows."""
    world.policy(f"circuit_breaker: {{max_requests: {BREAKER}}}\nretry: {{attempts: 1}}")
    deadline = time.monotonic() + ANSWER_S
    while True:
        seen = (
            await caller.command("burst", count=3 * BREAKER, at_once=3 * BREAKER, headers={"x-wait": "1"})
        )["seen"]
        if failed(seen) or time.monotonic() > deadline:
            return total(seen) - failed(seen), failed(seen)


async def canary(world: World, caller: Peer, calls: int) -> float:
    """Percentage points between a canary's share and the wanted one."""
    newer = await world.start("server", 5, PLEXUS_MESH__VERSION="9.0")
    world.policy("subsets: {stable: {version: '0.*', weight: 90}, canary: {version: '9.*', weight: 10}}")
    deadline = time.monotonic() + ANSWER_S
    while True:
        seen = (await caller.command("burst", count=200, at_once=4))["seen"]
        if (set(seen) == {"1", "2", "3", "5"} and seen["5"] < 45) or time.monotonic() > deadline:
            break
    seen = (await caller.command("burst", count=calls, at_once=16))["seen"]
    world.policy("retry: {attempts: 3}")
    await newer.end(signal.SIGTERM)
    await until_all(caller, {"1", "2", "3"})
    share: float = 100 * seen.get("5", 0) / total(seen)
    return abs(share - 10)


async def outage(world: World, caller: Peer, rate: float, seconds: float) -> tuple[dict[str, int], float]:
    """The control plane away; how calls went, and how long after it a waiting instance joined."""
    control = world.peers[0]
    await caller.command("start", rate=rate)
    await control.end(signal.SIGKILL)
    waiting = await world.start("server", 6, wait=False)
    await asyncio.sleep(seconds)
    world.peers[0] = await world.start("control")
    back = time.monotonic()
    await waiting.read()
    joined_s = time.monotonic() - back
    seen: dict[str, int] = (await caller.command("stop"))["seen"]
    await until_all(caller, {"1", "2", "3", "6"})
    await waiting.end(signal.SIGTERM)
    return seen, joined_s


async def rotation(folder: Path, rate: float, seconds: float, every_s: float) -> dict[str, int]:
    """Certificates that are renewed every few seconds, and connections that are made anew."""
    async with World(folder, ttl_s=every_s * 1.5) as world:
        await world.start("control")
        servers = [await world.start("server", number) for number in (1, 2, 3)]
        caller = await world.start("caller")
        await until_all(caller, {"1", "2", "3"})
        await caller.command("start", rate=rate)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # A connection outlives its certificate: only a new one shows that the new one holds.
            await servers[0].end(signal.SIGTERM)
            servers[0] = await world.start("server", 1)
            await asyncio.sleep(every_s)
        seen: dict[str, int] = (await caller.command("stop"))["seen"]
    return seen


def row(name: str, value: str, bar: str) -> None:
    """One line of the table, as soon as it is known."""
    print(f"{name:<46} {value:>26}   {bar}", flush=True)


def show(name: str, seen: dict[str, int]) -> int:
    """The failures among calls, with their texts."""
    row(name, f"{failed(seen)} of {total(seen)} failed", "0")
    for text, count in sorted(seen.items()):
        if ": " in text:
            print(f"    {count} x {text}")
    return failed(seen)


async def drive(options: argparse.Namespace) -> dict[str, float]:
    """Everything, one after the other."""
    lengths = MODES[options.mode]
    rate = options.rate
    report: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
        async with World(Path(folder) / "state") as world:
            world.policy("retry: {attempts: 3}")
            await world.start("control")
            for number in (1, 2, 3):
                await world.start("server", number)
            caller = await world.start("caller")
            await until_all(caller, {"1", "2", "3"})
            seen = await rolling(world, caller, rate, lengths.rounds)
            report["rolling_failed"] = show(f"{lengths.rounds} rolling restarts of three", seen)
            seen = await killed(world, caller, rate, lengths.kills)
            report["kill_failed"] = show(f"{lengths.kills} x kill -9 of one of four", seen)
            back_s, normal_p99, seconds = await stopped(world, caller, rate, lengths.stop_s)
            row("SIGSTOP of one of four: p99 normal again after", f"{back_s:.0f} s", f"{BAR_STOP_S:g} s")
            row("    p99 before", f"{normal_p99 * 1e3:.1f} ms", "")
            print("    p99 of each second after, ms:", *(f"{value * 1e3:.0f}" for value in seconds))
            await until_all(caller, {"1", "2", "3"})
            amplification = await dead_backend(world, caller, rate / 2, lengths.failing_s)
            report["retry_amplification"] = round(amplification, 3)
            row("attempts a call when every call fails", f"{amplification:.3f}", f"{BAR_AMPLIFICATION:g}")
            passed, shed = await breaker(world, caller)
            row(f"circuit breaker at {BREAKER}", f"{passed} passed, {shed} shed", f"{BREAKER} passed")
            points = await canary(world, caller, lengths.canary_calls)
            report["canary_error_points"] = round(points, 2)
            row("canary at 10 %, off by", f"{points:.2f} points", f"{BAR_CANARY_POINTS:g}")
            seen, joined_s = await outage(world, caller, rate, lengths.outage_s)
            report["outage_failed"] = show(f"control plane away for {lengths.outage_s:g} s", seen)
            row("    an instance started meanwhile joined after", f"{joined_s:.1f} s", "")
        seen = await rotation(Path(folder) / "rotation", rate, lengths.rotation_s, 5.0)
        report["rotation_failed"] = show(f"certificates renewed every 5 s for {lengths.rotation_s:g} s", seen)
    return report


def main() -> None:
    """Drive, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=MODES, default="full", help="how much is done")
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second")
    parser.add_argument("--role", choices=["control", "server", "caller"], help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "control":
        asyncio.run(run_control(options.state, options.port))
    elif options.role == "server":
        asyncio.run(run_server(options.state, options.port, options.number))
    elif options.role == "caller":
        asyncio.run(run_caller(options.state, options.port))
    else:
        print(json.dumps(asyncio.run(drive(options))))


if __name__ == "__main__":
    main()
