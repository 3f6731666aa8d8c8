"""Servers of the user's own under `plexus join`: asked for their health, and stopped without a lost call."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from services.mesh.join.probe import check_of
from services.runtime.errors import InvalidArgumentError
from tests.e2e.backend import REPOSITORY
from tests.polyglot.callers import environment, joined
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.polyglot.callers import Calling

pytestmark = pytest.mark.timeout(400)
WITHIN_S = 90.0
PYTHON_SERVER = (sys.executable, REPOSITORY / "tests/mesh/joined_server.py")
PYTHON_CALLER = (sys.executable, REPOSITORY / "tests/mesh/caller.py")


class World:
    """A control plane in a process of its own, and its state folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.port = port
        policies = folder / "policies"
        policies.mkdir()
        # A retry would hide a call that a stopping server lost.
        (policies / "orders.yaml").write_text("service: orders\nretry: {attempts: 1}\n")
        self.environment = environment(
            PLEXUS_STATE=str(self.state),
            PLEXUS_MESH__POLICIES=str(policies),
            PLEXUS_MESH__CONTROL_PLANES=f"localhost:{port}",
        )

    def registered(self) -> dict[int, str]:
        """Health of the instances of orders, by port."""
        entries = json.loads((self.state / "data/control/catalogue.json").read_text())["instances"]
        return {entry["port"]: entry["health"] for entry in entries if entry["service"] == "orders"}

    async def until(self, done: Callable[[dict[int, str]], object]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done(self.registered()):
            assert time.monotonic() < deadline, self.registered()
            await asyncio.sleep(0.05)

    @asynccontextmanager
    async def server(self, *command: str | Path, options: tuple[str, ...] = ()) -> AsyncIterator[Calling]:
        port = str(command[-1] if str(command[-1]).isdigit() else command[-2])
        async with joined(
            "orders", command, self.environment, self.folder, "--port", port, *options
        ) as running:
            yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), free_port())
    with subprocess.Popen(
        [sys.executable, "-m", "tests.mesh.peers", "control", str(made.state), str(made.port)],
        stdout=subprocess.PIPE,
        env=made.environment,
        cwd=REPOSITORY,
    ) as control:
        try:
            assert control.stdout is not None
            assert json.loads(control.stdout.readline())["ready"] == made.port
            yield made
        finally:
            control.kill()


async def pid_of(server: Calling) -> int:
    assert server.process.stdout is not None
    return int(await asyncio.wait_for(server.process.stdout.readline(), WITHIN_S))


@pytest.mark.parametrize("check", ["auto", "grpc"])
async def test_a_program_that_tells_its_health_is_called_while_it_says_that_it_serves(
    world: World, check: str
) -> None:
    port = free_port()
    command = (*PYTHON_SERVER, str(port), "--health")
    async with world.server(*command, options=("--check", check)) as server:
        pid = await pid_of(server)
        await world.until(lambda found: found == {port: "serving"})
        os.kill(pid, signal.SIGUSR1)
        await world.until(lambda found: found == {port: "not_serving"})
        os.kill(pid, signal.SIGUSR1)
        await world.until(lambda found: found == {port: "serving"})


@pytest.mark.parametrize(("check", "offers"), [("auto", ("--any",)), ("tcp", ("--health",)), ("none", ())])
async def test_a_program_that_is_not_asked_is_believed_to_serve_while_its_port_answers(
    world: World, check: str, offers: tuple[str, ...]
) -> None:
    port = free_port()
    async with world.server(*PYTHON_SERVER, str(port), *offers, options=("--check", check)) as server:
        pid = await pid_of(server)
        await world.until(lambda found: found == {port: "serving"})
        os.kill(pid, signal.SIGUSR1)  # which changes what it would say, if it were asked
        os.kill(pid, signal.SIGTERM)
        await asyncio.wait_for(server.process.wait(), WITHIN_S)
    await world.until(lambda found: found == {})


def test_an_unknown_check_names_those_that_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match="there are auto, grpc, tcp, none"):
        check_of("http")


class Load:
    """A caller in Python that calls orders all the time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.seen: dict[str, int] = {}
        self._stop = asyncio.Event()

    async def rows(self, count: int = 100) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = {"id": 0, "count": count, "service": "orders", "at_once": 4}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), WITHIN_S)
        seen: dict[str, int] = json.loads(line)["seen"]
        for answer, times in seen.items():
            self.seen[answer] = self.seen.get(answer, 0) + times
        return seen

    async def run(self) -> None:
        while not self._stop.is_set():
            await self.rows()

    def stop(self) -> None:
        self._stop.set()


@pytest.mark.parametrize("language", ["python", "go"])
async def test_a_stopped_server_loses_no_call(
    world: World, language: str, request: pytest.FixtureRequest
) -> None:
    def command(port: int) -> tuple[str | Path, ...]:
        if language == "python":
            return (*PYTHON_SERVER, str(port))
        return (request.getfixturevalue("go_program"), "serve", str(port))

    stays, goes = free_port(), free_port()
    async with (
        world.server(*command(stays)),
        joined("accounts", PYTHON_CALLER, world.environment, world.folder) as client,
    ):
        assert client.process.stdout is not None
        await asyncio.wait_for(client.process.stdout.readline(), WITHIN_S)
        for _ in range(2):
            load = Load(client.process)
            async with world.server(*command(goes)) as server:
                deadline = time.monotonic() + WITHIN_S
                while (await load.rows()).keys() != {str(stays), str(goes)}:
                    assert time.monotonic() < deadline, load.seen
                load.seen.clear()
                calling = asyncio.create_task(load.run())
                server.process.terminate()
                assert await asyncio.wait_for(server.process.wait(), WITHIN_S) == 0
                load.stop()
                await calling
            assert load.seen.keys() <= {str(stays), str(goes)}, load.seen
            assert load.seen[str(goes)]
            await world.until(lambda found: found == {stays: "serving"})
