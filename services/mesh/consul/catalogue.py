"""Consul's health answers as instances, and the watch of all services at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import structlog

from services.mesh.consul.answers import listing, mapping
from services.mesh.consul.watch import changes
from services.mesh.registry.domain import Health, Instance, is_service_name
from services.runtime.errors import DataLossError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.consul.answers import Answer
    from services.mesh.consul.client import ConsulClient

log = structlog.get_logger(__name__)

LEASE = "lease:"
"""Prefix of the id of the check that an instance renews itself."""
PROBE = "probe:"
"""Prefix of the id of the check that the agent makes."""
VERSION, ZONE = "version", "zone"
"""Meta keys that are fields of an Instance."""
EXPIRED = "TTL expired"
"""How Consul begins the output of a lease that ran out."""
CANARY = "consul"
"""A service that every Consul has: who does not see it sees nothing because of missing rights."""
_SERVICES = "/v1/catalog/services"
_CRITICAL, _WARNING = "critical", "warning"
_MAINTENANCE = ("_service_maintenance", "_node_maintenance")
_MAX_WEIGHT = 1000


def health_path(service: str) -> str:
    """Of the answer that holds a service's instances."""
    return f"/v1/health/service/{quote(service, safe='')}"


def instances_of(answer: Answer) -> list[Instance]:
    """The instances in a health answer, sorted by id; those whose lease ran out are left out.

    Raises:
        DataLossError: The answer has not Consul's shape.
    """
    found = []
    for entry in listing(answer.json(), "health answer"):
        try:
            instance = _instance(mapping(entry, "health entry"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataLossError(
                "Consul's health entry is malformed", reason="CONSUL_ANSWER_INVALID"
            ) from error
        if instance is not None:
            found.append(instance)
    return sorted(found, key=lambda instance: (instance.service, instance.id))


def _instance(entry: Any) -> Instance | None:
    service, node = entry["Service"], entry["Node"]
    checks = entry["Checks"] or ()
    if any(_lapsed(check) for check in checks):
        return None
    meta = dict(service["Meta"] or {})
    weights = service.get("Weights") or {}
    warned = any(check["Status"] == _WARNING for check in checks)
    weight = int(weights.get("Warning" if warned else "Passing", 1))
    try:
        return Instance(
            id=service["ID"],
            service=service["Service"],
            address=service["Address"] or node["Address"],
            port=service.get("Port", 0),
            version=meta.pop(VERSION, ""),
            zone=meta.pop(ZONE, "local"),
            weight=min(max(weight, 1), _MAX_WEIGHT),
            tags=tuple(service["Tags"] or ()),
            meta=meta,
            health=_health(checks),
        )
    except InvalidArgumentError as error:
        # Registered by others, and nothing that a gRPC client could call: a host name, no port.
        log.debug("consul_instance_skipped", service=service["Service"], reason=error.message)
        return None


def _lapsed(check: Any) -> bool:
    return bool(
        check["CheckID"].startswith(LEASE)
        and check["Status"] == _CRITICAL
        and check["Output"].startswith(EXPIRED)
    )


def _health(checks: Any) -> Health:
    """Maintenance is a critical check too, but means that calls may finish."""
    critical = [check["CheckID"] for check in checks if check["Status"] == _CRITICAL]
    if not critical:
        return Health.SERVING
    return Health.DRAINING if any(name.startswith(_MAINTENANCE) for name in critical) else Health.NOT_SERVING


def service_names(answer: Answer) -> set[str]:
    """The services in the catalogue that a client could call by name, Consul's own left out.

    Raises:
        DataLossError: The answer has not Consul's shape.
    """
    return {name for name in mapping(answer.json(), "service list") if is_service_name(name)} - {CANARY}


async def sees_services(client: ConsulClient) -> bool:
    """Whether the token shows services at all."""
    answer = await client.request("GET", _SERVICES)
    return CANARY in mapping(answer.json(), "service list")


async def watch_service(client: ConsulClient, service: str) -> AsyncIterator[list[Instance]]:
    """The instances of a service, now and after each change.

    That a service that had instances has none is believed only after a plain read that nothing was filtered
    from, by a token that sees the canary: a streamed answer looks the same when the token lost its rights.
    """
    had = False

    async def believe(answer: Answer) -> bool:
        nonlocal had
        empty = not listing(answer.json(), "health answer")
        instances_of(answer)  # raises what cannot be used
        if empty and had:
            plain = await client.request("GET", health_path(service))
            if plain.filtered or plain.body != answer.body or not await sees_services(client):
                return False
        had = not empty
        return True

    async for answer in changes(client, health_path(service), believe=believe):
        yield instances_of(answer)


async def watch_names(client: ConsulClient) -> AsyncIterator[set[str]]:
    """The names of all services, now and after each change."""

    async def believe(answer: Answer) -> bool:
        return CANARY in mapping(answer.json(), "service list")

    async for answer in changes(client, _SERVICES, believe=believe):
        yield service_names(answer)


async def watch_all(client: ConsulClient) -> AsyncIterator[list[Instance]]:
    """The instances of all services, first when all are known and then after each change."""
    known: dict[str, list[Instance]] = {}
    told: dict[str, list[Instance]] | None = None
    async for changed in watch_changes(client):
        known = {name: members for name, members in {**known, **changed}.items() if members}
        if known != told:
            told = known
            yield [instance for _, members in sorted(known.items()) for instance in members]


async def watch_changes(client: ConsulClient) -> AsyncIterator[dict[str, list[Instance]]]:
    """The instances of every service once all are known, then those of services that changed.

    One watch for the names and one for each service: a single watch of everything costs the servers several
    times as much.
    """
    watches = _Watches(client)
    try:
        while True:
            await watches.wait()
            changed = watches.take()
            if changed is not None:
                yield changed
    finally:
        await watches.close()


class _Watches:
    """A task for the names and one for each service."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._services: dict[str, asyncio.Task[None]] = {}
        self._waiting: set[str] = set()
        self._changes: dict[str, list[Instance]] = {}
        self._told = False
        self._named = False
        self._woken = asyncio.Event()
        self._names = asyncio.create_task(self._follow_names(), name="consul-watch-names")

    async def _follow(self, service: str) -> None:
        async for instances in watch_service(self._client, service):
            self._changes[service] = instances
            self._waiting.discard(service)
            self._woken.set()

    async def _follow_names(self) -> None:
        async for names in watch_names(self._client):
            for gone in self._services.keys() - names:
                self._services.pop(gone).cancel()
                self._waiting.discard(gone)
                self._changes[gone] = []
            for new in sorted(names - self._services.keys()):
                self._waiting.add(new)
                self._services[new] = asyncio.create_task(self._follow(new), name=f"consul-watch-{new}")
            self._named = True
            self._woken.set()

    async def wait(self) -> None:
        """Wait for a change; a watch that ended, which only a defect does, must not look like silence."""
        tasks = [self._names, *self._services.values()]
        waiting = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        self._woken.clear()
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()

    def take(self) -> dict[str, list[Instance]] | None:
        """What changed since the last time; None if nothing did or not all is known for the first time."""
        if not self._told and (not self._named or self._waiting):
            return None
        if self._told and not self._changes:
            return None
        self._told = True
        changes, self._changes = self._changes, {}
        return changes

    async def close(self) -> None:
        """End all tasks."""
        tasks = [self._names, *self._services.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
