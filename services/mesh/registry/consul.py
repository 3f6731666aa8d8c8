"""The Registry in Consul: instances of the local agent, seen by everyone in the datacentre."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import structlog

from services.mesh.consul import catalogue
from services.mesh.registry.domain import Health, Instance
from services.runtime.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.consul.client import ConsulClient

log = structlog.get_logger(__name__)

HEALTH_META = "health"
"""Meta key of `host:port` where an instance answers gRPC health checks without TLS: the agent has no
certificate to show. Without it and `PORT_META` the lease alone tells whether the instance lives."""
PORT_META = "probe"
"""Meta key of a `host:port` where the agent can at least see that connections are taken."""
PLAIN_TAG = "http"
"""Tag of what is not called inside the mesh, by mTLS, but from outside."""
_READS_AT_ONCE = 16
_CHECK_TIMEOUT_S = 5.0


class ConsulRegistry:
    """Registry over an agent; the agent checks the instances and the catalogue forgets the dead.

    A lease is a TTL check: the instance renews it, and an agent that has lost its data says that it knows no
    such check, upon which the instance registers again.
    """

    def __init__(self, client: ConsulClient) -> None:
        """Use an open client.

        Args:
            client: Of the agent on this host: instances belong to the agent that they are registered with.
        """
        self._client = client
        self._draining: set[str] = set()

    async def register(self, instance: Instance, *, lease_s: float) -> None:
        """See Registry."""
        for key in (catalogue.VERSION, catalogue.ZONE):
            if key in instance.meta:
                raise InvalidArgumentError(f"{key} is a field of its own", field="instance.meta")
        await self._forget_predecessor(instance)
        await self._client.api.agent.service.register(
            instance.service,
            service_id=instance.id,
            address=instance.address,
            port=instance.port,
            tags=list(instance.tags),
            meta={**instance.meta, catalogue.VERSION: instance.version, catalogue.ZONE: instance.zone},
            weights={"Passing": instance.weight, "Warning": 1},
            connect={"Native": PLAIN_TAG not in instance.tags},
            check=self._lease(instance, lease_s),
            extra_checks=self._probes(instance),
            replace_existing_checks=True,
        )
        self._draining.discard(instance.id)
        await self.keep_alive(instance.id, instance.health)
        log.info("registered", instance=instance.id, address=f"{instance.address}:{instance.port}")

    async def _forget_predecessor(self, instance: Instance) -> None:
        """Remove a process of the same id that listened elsewhere: Consul would keep its checks' verdicts."""
        found = await self._client.request("GET", f"/v1/agent/service/{quote(instance.id, safe='')}")
        known = found.json()
        if known is not None and (known["Address"], known["Port"]) != (instance.address, instance.port):
            await self._client.api.agent.service.deregister(instance.id)

    def _lease(self, instance: Instance, lease_s: float) -> dict[str, Any]:
        return {
            "CheckID": f"{catalogue.LEASE}{instance.id}",
            "Name": "lease",
            "TTL": f"{round(lease_s * 1000)}ms",
            "Status": "passing",
            "DeregisterCriticalServiceAfter": f"{self._client.config.deregister_after_s:g}s",
        }

    def _probes(self, instance: Instance) -> list[dict[str, Any]]:
        health, port = instance.meta.get(HEALTH_META), instance.meta.get(PORT_META)
        if health:
            asks: dict[str, Any] = {"Name": "gRPC health", "GRPC": health, "GRPCUseTLS": False}
        elif port:
            asks = {"Name": "port", "TCP": port}
        else:
            return []
        config = self._client.config
        return [
            {
                "CheckID": f"{catalogue.PROBE}{instance.id}",
                **asks,
                "Interval": f"{config.check_interval_s:g}s",
                "Timeout": f"{min(_CHECK_TIMEOUT_S, config.check_interval_s):g}s",
                # An instance registers when it can serve; the first check may be an interval away.
                "Status": "passing",
                "DeregisterCriticalServiceAfter": f"{config.deregister_after_s:g}s",
            }
        ]

    async def keep_alive(self, instance_id: str, health: Health) -> None:
        """See Registry; draining is Consul's maintenance mode."""
        check = self._client.api.agent.check
        name = f"{catalogue.LEASE}{instance_id}"
        if health is Health.NOT_SERVING:
            known = await check.ttl_fail(name, notes="not serving")
        else:
            known = await check.ttl_pass(name)
        if not known:
            raise NotFoundError(f"Consul has no lease for {instance_id!r}", reason="LEASE_NOT_FOUND")
        draining = health is Health.DRAINING
        if draining != (instance_id in self._draining):
            await self._client.api.agent.service.maintenance(instance_id, draining, reason="draining")
            (self._draining.add if draining else self._draining.discard)(instance_id)

    async def deregister(self, instance_id: str) -> None:
        """See Registry."""
        self._draining.discard(instance_id)
        await self._client.api.agent.service.deregister(instance_id)

    async def instances(self, service: str = "") -> list[Instance]:
        """See Registry."""
        if service:
            return await self._read(service)
        answer = await self._client.request("GET", "/v1/catalog/services")
        at_once = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(name: str) -> list[Instance]:
            async with at_once:
                return await self._read(name)

        found = await asyncio.gather(*map(read, sorted(catalogue.service_names(answer))))
        return [instance for members in found for instance in members]

    async def _read(self, service: str) -> list[Instance]:
        answer = await self._client.request("GET", catalogue.health_path(service))
        return catalogue.instances_of(answer)

    def changes(self) -> AsyncIterator[dict[str, list[Instance]]]:
        """See Catalogue; while Consul does not answer nothing is told, and what was known holds."""
        return catalogue.watch_changes(self._client)

    def watch(self, service: str = "") -> AsyncIterator[list[Instance]]:
        """See Registry; while Consul does not answer nothing is told, and the last list holds."""
        if service:
            return catalogue.watch_service(self._client, service)
        return catalogue.watch_all(self._client)
