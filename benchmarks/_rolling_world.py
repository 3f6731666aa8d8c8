"""A state folder, the processes of a small mesh around it, and what can be asked of them."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks._processes import ANSWER_S, Process, Processes
from services.cli.supervisor import rundir

if TYPE_CHECKING:
    from types import TracebackType

    from tests.servers.consul import ConsulAgent

NAME = "vectors"
METHOD = "bench.Echo"
PEERS = Path(__file__).with_name("_rolling_peers.py")
_HANDLED = re.compile(
    r'^grpc_server_handled_total\{code="UNAVAILABLE",.*service="bench.*\} (\S+)$', re.MULTILINE
)

Seen = dict[str, int]
"""How many calls had which answer; one that failed is `CODE: text`."""


def failed(seen: Seen) -> int:
    """Calls that got no answer."""
    return sum(count for answer, count in seen.items() if ": " in answer)


def total(seen: Seen) -> int:
    """All calls."""
    return sum(seen.values())


class World:
    """A control plane, three instances and a caller; open it with `async with`, which starts them.

    Attributes:
        servers: The instances, by number.
    """

    def __init__(self, state: Path, *, ttl_s: float = 3600.0, consul: ConsulAgent | None = None) -> None:
        """Prepare, start nothing.

        Args:
            state: The state folder; made.
            ttl_s: Life of a certificate of the local CA, in seconds.
            consul: An agent to join; started and ended here.
        """
        self.state = state
        run_dir = rundir.RunDir(state)
        run_dir.create()
        self._port = rundir.control_port(run_dir)
        self._policies = state / "policies"
        self._policies.mkdir(exist_ok=True)
        self._environment = {
            "PLEXUS_MESH__POLICIES": str(self._policies),
            "PLEXUS_MESH__CERTIFICATE_TTL_S": str(ttl_s),
            "PLEXUS_TELEMETRY__LOG_FORMAT": "json",
        }
        self._consul = consul
        if consul is not None:
            self._environment["PLEXUS_CONSUL__ADDRESS"] = consul.url
            self._environment["PLEXUS_CONSUL__GRPC_ADDRESS"] = consul.grpc
        self._processes = Processes(state)
        self._stack = ExitStack()
        self._control: Process | None = None
        self._caller: Process | None = None
        self.servers: dict[int, Process] = {}

    async def __aenter__(self) -> Self:
        await self._processes.__aenter__()
        try:
            if self._consul is not None:
                self._stack.enter_context(self._consul)
            await self.start_control()
            for number in (1, 2, 3):
                await self.start_server(number)
            self._caller = await self._start("caller")
            await self._caller.read()
            await self.until_all({"1", "2", "3"})
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._processes.__aexit__(kind, error, trace)
        self._stack.close()

    async def _start(self, role: str, number: int = 0, **variables: str) -> Process:
        command = (sys.executable, PEERS, role, self.state, str(self._port), str(number))
        return await self._processes.start(
            f"{role} {number}", *map(str, command), **self._environment, **variables
        )

    async def start_control(self) -> None:
        """Start the control plane."""
        self._control = await self._start("control")
        await self._control.read()

    async def kill_control(self) -> None:
        """End it as kill -9 does."""
        assert self._control is not None
        await self._control.end(signal.SIGKILL)

    async def start_server(self, number: int, *, wait: bool = True, **variables: str) -> Process:
        """Start an instance; wait until it serves."""
        server = self.servers[number] = await self._start("server", number, **variables)
        if wait:
            await server.read()
        return server

    async def end_server(self, number: int, how: signal.Signals = signal.SIGTERM) -> None:
        """End an instance."""
        await self.servers.pop(number).end(how)

    def said(self, number: int, event: str) -> list[dict[str, Any]]:
        """The log entries of an instance with an event."""
        lines = (self.state / f"server-{number}.log").read_text(errors="replace").splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry.get("event") == event]

    async def ask(self, command: str, **options: Any) -> Any:
        """Have the caller do something."""
        assert self._caller is not None
        return await self._caller.ask(command, **options)

    async def load_ends(self) -> Seen:
        """Stop the load; what its calls got."""
        seen: Seen = (await self.ask("stop"))["seen"]
        return seen

    async def until_all(self, names: set[str]) -> None:
        """Wait until exactly these answer."""
        deadline = time.monotonic() + ANSWER_S
        while set(seen := (await self.ask("burst", count=30, at_once=1))["seen"]) != names:
            if time.monotonic() > deadline:
                sys.exit(f"wanted answers of {sorted(names)}, had {seen}")

    def policy(self, text: str) -> None:
        """Put a policy in force."""
        temporary = self._policies / f".{NAME}"
        temporary.write_text(f"service: {NAME}\n{text}")
        temporary.replace(self._policies / f"{NAME}.yaml")

    def unavailable(self) -> float:
        """Attempts that the instances have failed."""
        catalogue = json.loads((self.state / "data/control/catalogue.json").read_text())["instances"]
        count = 0.0
        for instance in catalogue:
            if instance["service"] == NAME:
                with urllib.request.urlopen(f"http://{instance['meta']['metrics']}/metrics") as answer:
                    count += sum(map(float, _HANDLED.findall(answer.read().decode())))
        return count
