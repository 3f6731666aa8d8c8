"""plexus join: a program of any language becomes part of the mesh."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.mesh.join import session, tied
from services.mesh.join.environment import Language, how
from services.mesh.join.probe import Check
from services.mesh.membership import Membership
from services.mesh.registry.domain import Instance
from services.runtime import telemetry
from services.runtime.config import MeshConfig, Settings, TelemetryConfig
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from services.mesh.join.environment import Joined

_END_S = 10.0


def language_of(text: str) -> Language:
    """Read a language.

    Raises:
        InvalidArgumentError: There are no instructions for it.
    """
    try:
        return Language(text)
    except ValueError as error:
        raise InvalidArgumentError(f"--language {text}: there are {', '.join(Language)}") from error


def report(joined: Joined, language: Language) -> dict[str, Any]:
    """What `plexus join --json` prints."""
    return {
        "service": joined.service,
        "spiffe_id": joined.identity.spiffe_id,
        "not_after": joined.identity.not_after.isoformat(),
        "environment": joined.environment(),
        "language": language.value,
        "how": list(how(language)),
    }


def instructions(language: Language) -> list[str]:
    """What to write in a program, as comments for a shell."""
    return [f"# {line}" for line in how(language)]


@dataclass(frozen=True, slots=True)
class Server:
    """What the program serves, to be registered.

    Attributes:
        address: IP address.
        port: TCP port.
        version: Of its software.
        weight: Share of calls relative to other instances.
        check: How it is asked whether it serves.
    """

    address: str
    port: int
    version: str = ""
    weight: int = 1
    check: Check = Check.AUTO

    def instance(self, service: str, zone: str) -> Instance:
        """It as an instance of a service.

        Raises:
            InvalidArgumentError: A value is wrong.
        """
        return Instance(
            id=f"{service}-{self.address}-{self.port}".replace(":", "."),
            service=service,
            address=self.address,
            port=self.port,
            version=self.version,
            zone=zone,
            weight=self.weight,
        )


def run(
    state_dir: Path,
    service: str,
    *,
    show: Callable[[Joined], None],
    ready: Callable[[], None],
    zone: str = "",
    server: Server | None = None,
    command: Sequence[str] = (),
    once: bool = False,
) -> int:
    """Join, show what the program needs, and stay until the command or a signal ends it.

    Args:
        state_dir: The state folder.
        service: Name to join under.
        show: Told the files.
        ready: Called once the program is in the mesh.
        zone: Where it runs; default: what the configuration says.
        server: What it serves.
        command: The program; none: stay until a signal.
        once: Do not stay.

    Returns:
        The exit code: the program's own.

    Raises:
        PlexusError: The name cannot be used, a value is wrong, no Plexus has run on the state folder, or
            there is no such program.
    """
    settings = Settings()
    telemetry.configure_logging("join", settings.section("telemetry", TelemetryConfig))
    session.check_service(service)
    config = settings.section("mesh", MeshConfig)
    state_dir = state_dir.resolve()
    controls = config.control_planes or _local_controls(state_dir)
    zone = zone or config.zone
    instance = None if server is None else server.instance(service, zone)

    async def joining() -> int:
        async with Membership(service, state_dir, settings) as member, AsyncExitStack() as stack:
            joined = await session.join(service, member.source, controls, zone)
            show(joined)
            if once:
                return 0
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            serving = None
            if server is not None and instance is not None:
                told = functools.partial(member.serve_health, stack)
                serving = session.Serving(instance, server.check, told)
            async with session.stay(
                joined, member.source, serving, registry=member.registry, lease_s=config.lease_s
            ) as leave:
                if not command:
                    ready()
                    await stop.wait()
                    await leave()
                    return 0
                return await _program(joined, command, stop, ready, leave)

    return asyncio.run(joining())


async def _program(
    joined: Joined,
    command: Sequence[str],
    stop: asyncio.Event,
    ready: Callable[[], None],
    leave: Callable[[], Awaitable[None]],
) -> int:
    environment = {**os.environ, **joined.environment()}
    if shutil.which(command[0]) is None:
        raise NotFoundError(f"{command[0]}: no such program")
    program = await asyncio.create_subprocess_exec(*tied.command(list(command)), env=environment)
    ready()
    return await _until(program, stop, leave)


def _local_controls(state_dir: Path) -> list[str]:
    """Where the control plane of a state folder is, as it says itself."""
    try:
        content = json.loads((state_dir / "identities" / "cli" / "bootstrap.json").read_text())
        return [str(server["server_uri"]) for server in content["xds_servers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnavailableError(f"no Plexus has run on {state_dir}: start it with `plexus up`") from error


async def _until(
    program: asyncio.subprocess.Process, stop: asyncio.Event, leave: Callable[[], Awaitable[None]]
) -> int:
    """Wait for the program; a signal to us is passed on once nobody calls it; then it has to end soon."""
    ended = asyncio.create_task(program.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not ended.done():
        await leave()
        with contextlib.suppress(ProcessLookupError):
            program.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(ended), _END_S)
        except TimeoutError:
            program.kill()
    code = await ended
    return code if code >= 0 else 128 - code
