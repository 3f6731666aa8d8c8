"""The registry from a service's side: the Protocol over gRPC, and a registration that stays alive."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import grpc.aio
import structlog
from google.protobuf import duration_pb2

from plexus.registry.v1 import registry_pb2, registry_pb2_grpc
from services.mesh.departure import departed
from services.mesh.registry import convert
from services.mesh.registry.domain import Health
from services.runtime.errors import NotFoundError, PlexusError
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from plexus.client.channel import MeshChannel
    from services.mesh.registry.domain import Instance, Registry
    from services.mesh.trust.domain import Identity

T = TypeVar("T")

log = structlog.get_logger(__name__)

_TIMEOUT_S = 5.0
_RETRY_MIN_S, _RETRY_MAX_S = 0.05, 2.0


class RemoteRegistry:
    """The Registry of a control plane."""

    def __init__(self, channel: grpc.aio.Channel | MeshChannel) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(cast("grpc.aio.Channel", channel))

    async def register(self, instance: Instance, *, lease_s: float) -> None:
        """See Registry."""
        lease = duration_pb2.Duration()
        lease.FromMilliseconds(round(lease_s * 1000))
        request = registry_pb2.RegisterRequest(instance=convert.instance_to(instance), lease=lease)
        await _told(self._stub.Register(request, timeout=_TIMEOUT_S))

    async def keep_alive(self, instance_id: str, health: Health) -> None:
        """See Registry."""
        request = registry_pb2.KeepAliveRequest(id=instance_id, health=convert.health_to(health))
        await _told(self._stub.KeepAlive(request, timeout=_TIMEOUT_S))

    async def deregister(self, instance_id: str) -> None:
        """See Registry."""
        await _told(self._stub.Deregister(registry_pb2.DeregisterRequest(id=instance_id), timeout=_TIMEOUT_S))

    async def instances(self, service: str = "") -> list[Instance]:
        """See Registry."""
        request = registry_pb2.ListInstancesRequest(service=service)
        response = await _told(self._stub.ListInstances(request, timeout=_TIMEOUT_S))
        return [convert.instance_from(message) for message in response.instances]

    async def watch(self, service: str = "") -> AsyncIterator[list[Instance]]:
        """See Registry."""
        try:
            async for response in self._stub.WatchInstances(
                registry_pb2.WatchInstancesRequest(service=service)
            ):
                yield [convert.instance_from(message) for message in response.instances]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, dependency="control") from error


async def _told(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, dependency="control") from error


class Registration:
    """Keeps one instance registered, whatever happens to the registry."""

    def __init__(self, registry: Registry, instance: Instance, *, lease_s: float) -> None:
        self._registry = registry
        self._instance = instance
        self._lease_s = lease_s
        self._changed = asyncio.Event()
        self.registered = asyncio.Event()

    @property
    def instance(self) -> Instance:
        """What is registered, or is about to be."""
        return self._instance

    def set_health(self, health: Health) -> None:
        """Report another health, at once; who leaves does not come back."""
        if self._instance.health not in {health, Health.DRAINING}:
            self._instance = replace(self._instance, health=health)
            self._changed.set()

    def replace(self, instance: Instance) -> None:
        """Register something else under the same id, at once; `registered` is set again when it is."""
        self._instance = instance
        self.registered.clear()
        self._changed.set()

    async def run(self) -> None:
        """Register and renew for ever; an unreachable registry is retried with back-off and jitter."""
        failures = 0
        while True:
            try:
                if self.registered.is_set():
                    await self._registry.keep_alive(self._instance.id, self._instance.health)
                else:
                    registering = self._instance
                    await self._registry.register(registering, lease_s=self._lease_s)
                    if registering.meta is not self._instance.meta:
                        continue  # replaced meanwhile
                    self.registered.set()
            except NotFoundError:
                self.registered.clear()
                continue
            except PlexusError as error:
                failures += 1
                if failures == 1:
                    log.warning("registry_unavailable", reason=error.reason)
                pause = min(_RETRY_MAX_S, self._lease_s / 3, _RETRY_MIN_S * 2**failures)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
                continue
            if failures:
                log.info("registry_available", after_failures=failures)
            failures = 0
            with contextlib.suppress(TimeoutError):  # the usual end of the wait: nothing changed
                await asyncio.wait_for(self._changed.wait(), self._lease_s / 3)
            self._changed.clear()

    async def leave(self, identity: Identity) -> None:
        """Take no new calls, and wait, bounded, until no client of the mesh makes any.

        If the registry cannot be told now, the renewals go on trying.
        """
        if not self.registered.is_set():
            return
        self.set_health(Health.DRAINING)
        try:
            await self._registry.keep_alive(self._instance.id, Health.DRAINING)
        except PlexusError as error:
            log.warning("drain_not_told", reason=error.reason)
        else:
            await departed(self._registry, self._instance, identity)

    async def deregister(self) -> None:
        """Be gone; if the registry cannot be told, the lease runs out."""
        self.registered.clear()
        try:
            await self._registry.deregister(self._instance.id)
        except PlexusError as error:
            log.warning("deregistration_failed", reason=error.reason)
