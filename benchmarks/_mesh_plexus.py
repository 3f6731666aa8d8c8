"""The ends of the path through Plexus, and its control plane: each as every service and client is run."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._mesh_bare import SERVICE, Caller, add_to, answer, method, run_exactly, say, stop_event
from plexus.client.channel import Mesh
from services.mesh import main as control_plane
from services.mesh.membership import Membership
from services.runtime.config import Settings, TelemetryConfig
from services.runtime.service import Service, ServiceRuntime, serve
from services.runtime.telemetry import configure_logging

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

NAME = "vectors"
"""A service that the shipped intentions let the caller's identity use."""
IDENTITY = "cli"


async def _control(state: Path, port: int) -> None:
    await control_plane.serve(state, port, lambda: say(ready=True), stop_event())


async def _serve(state: Path, port: int) -> None:
    async def compose(runtime: ServiceRuntime, _stack: AsyncExitStack) -> None:
        add_to(runtime.server)

    await serve(
        Service(NAME, compose, (SERVICE,), stateless=True),
        state_dir=state,
        control_port=port,
        ready=lambda: say(ready=True),
        stop=stop_event(),
    )


async def _call(state: Path, port: int) -> None:
    async with Membership(IDENTITY, state, Settings()) as member:
        await member.join()
        member.enter_xds(port)
        async with Mesh() as mesh:
            await answer(Caller(method(mesh.channel(NAME))))


def main() -> None:
    """Be one of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["control", "serve", "call"])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True, help="of the control plane")
    options = parser.parse_args()
    configure_logging(options.role, TelemetryConfig(log_level="warning"))
    if options.role == "call":
        run_exactly(_call(options.state, options.port))
    else:
        asyncio.run((_control if options.role == "control" else _serve)(options.state, options.port))


if __name__ == "__main__":
    main()
