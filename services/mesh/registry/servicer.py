"""RegistryService over any Registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plexus.registry.v1 import registry_pb2, registry_pb2_grpc
from services.mesh.registry import convert
from services.runtime.errors import PermissionDeniedError
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.registry.domain import Registry

DEFAULT_LEASE_S = 10.0


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def Register(self, request: registry_pb2.RegisterRequest, context: Any) -> Any:
        instance = convert.instance_from(request.instance)
        _own(instance.service)
        await self._own_id(instance.id)
        lease_s = (
            request.lease.ToTimedelta().total_seconds() if request.HasField("lease") else DEFAULT_LEASE_S
        )
        await self._registry.register(instance, lease_s=lease_s)
        return registry_pb2.RegisterResponse()

    async def KeepAlive(self, request: registry_pb2.KeepAliveRequest, context: Any) -> Any:
        await self._own_id(request.id)
        await self._registry.keep_alive(request.id, convert.health_from(request.health))
        return registry_pb2.KeepAliveResponse()

    async def Deregister(self, request: registry_pb2.DeregisterRequest, context: Any) -> Any:
        await self._own_id(request.id)
        await self._registry.deregister(request.id)
        return registry_pb2.DeregisterResponse()

    async def ListInstances(self, request: registry_pb2.ListInstancesRequest, context: Any) -> Any:
        instances = await self._registry.instances(request.service)
        return registry_pb2.ListInstancesResponse(instances=map(convert.instance_to, instances))

    async def WatchInstances(
        self, request: registry_pb2.WatchInstancesRequest, context: Any
    ) -> AsyncIterator[registry_pb2.WatchInstancesResponse]:
        async for instances in self._registry.watch(request.service):
            yield registry_pb2.WatchInstancesResponse(instances=map(convert.instance_to, instances))

    async def _own_id(self, instance_id: str) -> None:
        """Refuse an id that another service holds: registering it would take that instance away."""
        for instance in await self._registry.instances():
            if instance.id == instance_id:
                _own(instance.service)


def _own(service: str) -> None:
    peer = current().peer
    if peer != service:
        raise PermissionDeniedError(
            f"{peer} may not change instances of {service}",
            reason="NOT_OWN_SERVICE",
            metadata={"service": service},
        )
