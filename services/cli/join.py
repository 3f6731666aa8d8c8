"""plexus join: a program of any language becomes part of the mesh."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING, Any

from services.mesh.join import session
from services.mesh.join.environment import Language, how
from services.mesh.registry.domain import Instance
from services.mesh.trust.local import LocalCertificateSource
from services.runtime import telemetry
from services.runtime.config import MeshConfig, Settings, TelemetryConfig
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from services.mesh.join.environment import Joined
    from services.mesh.trust.domain import CertificateSource

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


class Join:
    """One call of the command."""

    def __init__(self, state_dir: Path, service: str, *, zone: str = "") -> None:
        """Make the files.

        Raises:
            InvalidArgumentError: The name cannot be used.
            UnavailableError: No Plexus has run on the state folder.
        """
        settings = Settings()
        self._config = settings.section("mesh", MeshConfig)
        telemetry.configure_logging("join", settings.section("telemetry", TelemetryConfig))
        session.check_service(service)
        state_dir = state_dir.resolve()
        controls = self._config.control_planes or _local_controls(state_dir)
        self._zone = zone or self._config.zone
        self._source: CertificateSource = LocalCertificateSource(
            state_dir, service, self._config.certificate_ttl_s
        )
        self.joined = session.join(service, self._source, controls, self._zone)

    def instance(self, address: str, port: int, version: str, weight: int) -> Instance:
        """The instance to register.

        Raises:
            InvalidArgumentError: A value is wrong.
        """
        service = self.joined.service
        return Instance(
            id=f"{service}-{address}-{port}".replace(":", "."),
            service=service,
            address=address,
            port=port,
            version=version,
            zone=self._zone,
            weight=weight,
        )

    def stay(self, instance: Instance | None, command: Sequence[str], ready: Callable[[], None]) -> int:
        """Stay in the mesh until the command ends, or without one until a signal.

        Returns:
            The exit code.
        """
        return asyncio.run(self._stay(instance, command, ready))

    async def _stay(
        self, instance: Instance | None, command: Sequence[str], ready: Callable[[], None]
    ) -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with session.stay(self.joined, self._source, instance, lease_s=self._config.lease_s):
            if not command:
                ready()
                await stop.wait()
                return 0
            environment = {**os.environ, **self.joined.environment()}
            try:
                program = await asyncio.create_subprocess_exec(*command, env=environment)
            except FileNotFoundError as error:
                raise NotFoundError(f"no such program: {command[0]}") from error
            ready()
            return await _until(program, stop)


def _local_controls(state_dir: Path) -> list[str]:
    """Where the control plane of a state folder is, as it says itself."""
    try:
        content = json.loads((state_dir / "identities" / "cli" / "bootstrap.json").read_text())
        return [str(server["server_uri"]) for server in content["xds_servers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnavailableError(f"no Plexus has run on {state_dir}: start it with `plexus up`") from error


async def _until(program: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
    """Wait for the program; a signal to us is passed on, and after a while it has to end."""
    ended = asyncio.create_task(program.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not ended.done():
        with contextlib.suppress(ProcessLookupError):
            program.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(ended), _END_S)
        except TimeoutError:
            program.kill()
    code = await ended
    return code if code >= 0 else 128 - code
