"""A program's stay in the mesh: its files are kept fresh, and its port is registered while it answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from plexus.client.channel import Mesh
from services.mesh.bootstrap import write_bootstrap
from services.mesh.join.environment import Joined
from services.mesh.join.probe import HealthProbe, PortProbe, probe_of
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import PORT_META
from services.mesh.registry.domain import Health, is_service_name
from services.runtime.addresses import netloc
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from services.mesh.join.probe import Check, Probe
    from services.mesh.registry.domain import Instance, Registry
    from services.mesh.trust.domain import CertificateSource, Identity

log = structlog.get_logger(__name__)

RESERVED = frozenset({"control", "edge"})
"""Identities whose word is believed: by clients that take resources, and by services that take a consumer."""
_PROBE_S = 1.0
_SETTLE_S = 1.0
"""What callers sent before they let go of the program may still be on the way, and only it can see that."""
_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


def check_service(service: str) -> None:
    """Check a name to join under.

    Raises:
        InvalidArgumentError: It is none, or reserved.
    """
    if not is_service_name(service):
        raise InvalidArgumentError(
            f"{service!r} cannot be a service's name: use a DNS label of lower case", field="service"
        )
    if service in RESERVED:
        raise InvalidArgumentError(f"{service!r} is reserved: Plexus itself runs it", field="service")


async def join(service: str, source: CertificateSource, controls: Sequence[str], zone: str) -> Joined:
    """Make a program's files.

    Args:
        service: Its name in the mesh.
        source: Gives its certificate.
        controls: Control planes as host:port.
        zone: Where it runs.

    Raises:
        InvalidArgumentError: As `check_service`.
    """
    check_service(service)
    identity = await source.obtain()
    folder = identity.cert_path.parent
    bootstrap = write_bootstrap(folder, controls, f"{service}-{os.getpid()}", zone, "join")
    return Joined(service, identity, bootstrap)


@contextlib.asynccontextmanager
async def stay(
    joined: Joined,
    source: CertificateSource,
    serving: Serving | None,
    *,
    registry: Callable[[Mesh], Registry],
    lease_s: float,
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Keep the files fresh and, for a server, its registration, until the context ends.

    Gives what to await before the program is stopped: it returns when nobody in the mesh calls it any more.

    Args:
        joined: From `join`.
        source: The same as there.
        serving: What to register, once it serves and for as long as it does.
        registry: Where to register, given the mesh.
        lease_s: Life of the registration without a renewal.
    """
    async with contextlib.AsyncExitStack() as stack:
        rotation = _running(source.rotate(lambda _identity: None), name="certificate-rotation")
        stack.push_async_callback(_ended, rotation)
        leave: Callable[[], Awaitable[None]] = _nothing
        if serving is not None:
            os.environ["GRPC_XDS_BOOTSTRAP"] = str(joined.bootstrap)
            mesh = await stack.enter_async_context(Mesh())
            keeper = _Keeper(registry(mesh), serving, joined.identity, lease_s=lease_s)
            stack.push_async_callback(keeper.deregister)
            keeping = _running(keeper.run(), name="registration")
            stack.push_async_callback(_ended, keeping)
            leave = keeper.leave
        yield leave


async def _nothing() -> None:
    """Nobody calls what does not serve."""


def _running(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
    """Start a loop; if it crashes, that is told at once and not when the program ends."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_crash)
    return task


def _tell_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background_loop_crashed", loop=task.get_name(), exc_info=error)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Serving:
    """What a program serves.

    Attributes:
        instance: To be registered.
        check: How it is asked whether it serves.
        told: Given a health to serve, opens where the Consul agent can ask for it; gives what to add to the
            instance's meta.
    """

    instance: Instance
    check: Check
    told: Callable[[HealthServicer], Awaitable[dict[str, str]]]


class _Keeper:
    """Registers a program when it serves, and says when it does not."""

    def __init__(self, registry: Registry, serving: Serving, identity: Identity, *, lease_s: float) -> None:
        self._serving = serving
        self._identity = identity
        self._lease_s = lease_s
        self._registry = registry
        self._health = HealthServicer()
        self._registration: Registration | None = None

    async def run(self) -> None:
        """For ever."""
        instance = self._serving.instance
        probe = await probe_of(self._serving.check, instance, self._identity, pause_s=_PROBE_S)
        serves = False
        renewal: asyncio.Task[None] | None = None
        try:
            while True:
                now = await probe.serves()
                if now != serves:
                    serves = now
                    log.info("port_answers" if serves else "port_silent", port=instance.port)
                    await self._health.set("", _STATUS[serves])
                if self._registration is not None:
                    self._registration.set_health(Health.SERVING if serves else Health.NOT_SERVING)
                elif serves:
                    meta = await self._meta(probe)
                    self._registration = Registration(
                        self._registry, replace(instance, meta=meta), lease_s=self._lease_s
                    )
                    renewal = _running(self._registration.run(), name="renewal")
                await asyncio.sleep(_PROBE_S)
        finally:
            if renewal is not None:
                await _ended(renewal)
            await probe.close()

    async def _meta(self, probe: Probe) -> dict[str, str]:
        """Where a Consul agent may look: it has no certificate, so this process answers for the program."""
        instance = self._serving.instance
        if isinstance(probe, HealthProbe):
            return instance.meta | await self._serving.told(self._health)
        if isinstance(probe, PortProbe):
            return instance.meta | {PORT_META: netloc(instance.address, instance.port)}
        return instance.meta

    async def leave(self) -> None:
        """Return when nobody calls the program any more."""
        if self._registration is not None and self._registration.registered.is_set():
            await self._registration.leave(self._identity)
            await asyncio.sleep(_SETTLE_S)

    async def deregister(self) -> None:
        """Be gone."""
        if self._registration is not None:
            await self._registration.deregister()
