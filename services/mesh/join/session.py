"""A program's stay in the mesh: its files are kept fresh, and its port is registered while it answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from typing import TYPE_CHECKING

import structlog

from plexus.client.channel import Mesh
from services.mesh.bootstrap import write_bootstrap
from services.mesh.join.environment import Joined
from services.mesh.registry.client import Registration
from services.mesh.registry.domain import Health, is_service_name
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.mesh.registry.domain import Instance, Registry
    from services.mesh.trust.domain import CertificateSource

log = structlog.get_logger(__name__)

RESERVED = frozenset({"control", "edge"})
"""Identities whose word is believed: by clients that take resources, and by services that take a consumer."""
_PROBE_S = 1.0
_CONNECT_S = 2.0


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
    instance: Instance | None,
    *,
    registry: Callable[[Mesh], Registry],
    lease_s: float,
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Keep the files fresh and, with an instance, its registration, until the context ends.

    Gives what to await before the program is stopped: it returns when nobody in the mesh calls it any more.

    Args:
        joined: From `join`.
        source: The same as there.
        instance: What to register, once its port takes connections and for as long as it does.
        registry: Where to register, given the mesh.
        lease_s: Life of the registration without a renewal.
    """
    async with contextlib.AsyncExitStack() as stack:
        rotation = asyncio.create_task(source.rotate(lambda _identity: None), name="certificate-rotation")
        stack.push_async_callback(_ended, rotation)
        leave: Callable[[], Awaitable[None]] = _nothing
        if instance is not None:
            os.environ["GRPC_XDS_BOOTSTRAP"] = str(joined.bootstrap)
            mesh = await stack.enter_async_context(Mesh())
            registration = Registration(registry(mesh), instance, lease_s=lease_s)
            keeping = asyncio.create_task(_keep_registered(registration, instance), name="registration")
            stack.push_async_callback(registration.deregister)
            stack.push_async_callback(_ended, keeping)
            leave = functools.partial(registration.leave, joined.identity)
        yield leave


async def _nothing() -> None:
    """Nobody calls what does not serve."""


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _keep_registered(registration: Registration, instance: Instance) -> None:
    serving = False
    renewal: asyncio.Task[None] | None = None
    try:
        while True:
            answers = await _answers(instance)
            if answers and renewal is None:
                renewal = asyncio.create_task(registration.run())
            if answers != serving:
                serving = answers
                registration.set_health(Health.SERVING if serving else Health.NOT_SERVING)
                log.info("port_answers" if serving else "port_silent", port=instance.port)
            await asyncio.sleep(_PROBE_S)
    finally:
        if renewal is not None:
            await _ended(renewal)


async def _answers(instance: Instance) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(instance.address, instance.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
