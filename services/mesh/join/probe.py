"""Whether a joined program serves: by its own word where it gives one, else by its port."""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from services.runtime.addresses import netloc
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.mesh.registry.domain import Instance
    from services.mesh.trust.domain import Identity

log = structlog.get_logger(__name__)

_CHECK = "/grpc.health.v1.Health/Check"
_CONNECT_S = 2.0
_ASK_S = 2.0
_LATE = 3
"""So often in a row it may fail to answer in time."""
_TRIES = 5
"""So often a port that takes connections may fail to answer before it is taken for one without health."""
_NO_HEALTH = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,  # it has the service, and keeps no health of the program as a whole
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INTERNAL,
}


class Check(StrEnum):
    """How a program is asked whether it serves."""

    AUTO = "auto"
    """Its gRPC health, if it answers when asked once; else its port."""
    GRPC = "grpc"
    """grpc.health.v1 over mTLS."""
    TCP = "tcp"
    """A connection to its port."""
    NONE = "none"
    """Not at all: it serves while it runs."""


def check_of(text: str) -> Check:
    """Read one.

    Raises:
        InvalidArgumentError: There is no such check.
    """
    try:
        return Check(text)
    except ValueError as error:
        raise InvalidArgumentError(f"--check {text}: there are {', '.join(Check)}") from error


class Probe(Protocol):
    """Asks a program."""

    async def serves(self) -> bool:
        """Whether it takes calls now."""
        ...

    async def close(self) -> None:
        """Let go of what it holds."""
        ...


class Trust:
    """A probe that does not look."""

    async def serves(self) -> bool:
        """See Probe."""
        return True

    async def close(self) -> None:
        """See Probe."""


class PortProbe:
    """Sees whether connections are taken."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    async def serves(self) -> bool:
        """See Probe."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, writer = await asyncio.open_connection(self._instance.address, self._instance.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    async def close(self) -> None:
        """See Probe."""


class HealthProbe:
    """Asks grpc.health.v1 about the program as a whole, by mTLS with the program's own identity."""

    def __init__(self, instance: Instance, identity: Identity) -> None:
        self._instance = instance
        self._identity = identity
        self._channel: grpc.aio.Channel | None = None
        self._written_ns = 0
        self._said = False
        self._late = 0

    async def ask(self) -> health_pb2.HealthCheckResponse | None:
        """What it says; None if it says something else, as who answers any method does.

        Raises:
            grpc.aio.AioRpcError: It does not.
        """
        ask: Any = (await self._current()).unary_unary(_CHECK)
        # Not read by the stub: to that, what cannot be read is nothing.
        answer: bytes = await ask(b"", timeout=_ASK_S)
        try:
            return health_pb2.HealthCheckResponse.FromString(answer)
        except DecodeError:
            return None

    async def serves(self) -> bool:
        """See Probe; a program that is too busy to answer is believed what it said for a while."""
        try:
            answer = await self.ask()
            self._said = answer is not None and answer.status == health_pb2.HealthCheckResponse.SERVING
            self._late = 0
        except grpc.aio.AioRpcError as error:
            self._late += 1
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or self._late >= _LATE:
                self._said = False
        return self._said

    async def close(self) -> None:
        """See Probe."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def _current(self) -> grpc.aio.Channel:
        """A channel with the present certificate, which a channel reads once."""
        identity = self._identity
        written_ns = identity.ca_path.stat().st_mtime_ns  # the last of the three to be written
        if self._channel is None or written_ns != self._written_ns:
            await self.close()
            self._written_ns = written_ns
            files = (identity.ca_path, identity.key_path, identity.cert_path)
            credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
            host, port = self._instance.address, self._instance.port
            self._channel = grpc.aio.secure_channel(
                netloc(host, port),
                credentials,
                [
                    ("grpc.ssl_target_name_override", f"{self._instance.service}.plexus.local"),
                    # A program that starts is looked at each second, not ever more seldom.
                    ("grpc.initial_reconnect_backoff_ms", 500),
                    ("grpc.max_reconnect_backoff_ms", 1000),
                    ("grpc.use_local_subchannel_pool", 1),
                ],
            )
        return self._channel


async def probe_of(check: Check, instance: Instance, identity: Identity, *, pause_s: float) -> Probe:
    """The probe for a program; with AUTO, once its port takes connections.

    Args:
        check: How to ask.
        instance: Whom.
        identity: Its certificate.
        pause_s: Between two looks.
    """
    if check is Check.NONE:
        return Trust()
    port = PortProbe(instance)
    if check is Check.TCP:
        return port
    health = HealthProbe(instance, identity)
    if check is Check.GRPC:
        return health
    reason = ""
    for _ in range(_TRIES):
        while not await port.serves():  # noqa: ASYNC110 - another process's port gives no event
            await asyncio.sleep(pause_s)
        try:
            answer = await health.ask()
            if answer is None or answer.status == health_pb2.HealthCheckResponse.UNKNOWN:
                reason = "UNREADABLE"
                break
        except grpc.aio.AioRpcError as error:
            reason = error.code().name
            if error.code() in _NO_HEALTH:
                break
        else:
            log.info("health_is_asked", check=Check.GRPC.value, port=instance.port)
            return health
        await asyncio.sleep(pause_s)
    await health.close()
    log.info("health_is_asked", check=Check.TCP.value, port=instance.port, grpc_health=reason)
    return port
