"""A joined program in a real Consul: the agent asks for the program's own health."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from tests.e2e.backend import REPOSITORY
from tests.polyglot.callers import environment, joined
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from tests.servers.consul import ConsulAgent

WITHIN_S = 90.0
SERVER = (sys.executable, REPOSITORY / "tests/mesh/joined_server.py")


async def until(http: httpx.Client, done: Callable[[list[dict[str, Any]]], object]) -> None:
    """Wait until the agent's checks of orders are as wanted."""
    found: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(WITHIN_S):
            while not done(found):
                await asyncio.sleep(0.05)
                checks = http.get("/agent/checks").json().values()
                found = [check for check in checks if check["ServiceName"] == "orders"]
    except TimeoutError:
        raise AssertionError(found) from None


def asked(status: str, says: str) -> Callable[[list[dict[str, Any]]], bool]:
    def done(checks: list[dict[str, Any]]) -> bool:
        return any(
            check["Name"] == "gRPC health" and check["Status"] == status and says in check["Output"]
            for check in checks
        )

    return done


async def test_the_agent_hears_what_a_joined_program_says_of_itself(
    agent: ConsulAgent, tmp_path: Path
) -> None:
    port = free_port()
    env = environment(
        PLEXUS_STATE=str(tmp_path),
        PLEXUS_CONSUL__ADDRESS=agent.url,
        PLEXUS_CONSUL__GRPC_ADDRESS=agent.grpc,
        PLEXUS_CONSUL__CHECK_INTERVAL_S="1",
        PLEXUS_MESH__CONTROL_PLANES=f"localhost:{free_port()}",
    )
    command = (*SERVER, str(port), "--health")
    with agent.http() as http:
        async with joined("orders", command, env, tmp_path, "--port", str(port)) as server:
            assert server.process.stdout is not None
            pid = int(await asyncio.wait_for(server.process.stdout.readline(), WITHIN_S))
            await until(http, asked("passing", "success"))
            os.kill(pid, signal.SIGUSR1)
            await until(http, asked("critical", "NOT_SERVING"))
            os.kill(pid, signal.SIGUSR1)
            await until(http, asked("passing", "success"))
        await until(http, lambda checks: not checks)
