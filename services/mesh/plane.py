"""Catalogue and policies in, resources out; only the services that changed are built again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from services.mesh.policy.table import PolicyTable
from services.mesh.registry.domain import is_service_name
from services.mesh.trust.domain import spiffe_id
from services.mesh.xds.build import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from services.mesh.ads.hub import Hub
    from services.mesh.policy.domain import Document
    from services.mesh.registry.domain import Instance
    from services.mesh.xds.resources import Key

log = structlog.get_logger(__name__)

MAX_UNKNOWN = 1000
"""Services that are published only because a client asked for them."""


class Plane:
    """What is published, and why.

    A service once published stays: its callers are told that its last instance is gone, not left with it.

    Attributes:
        policies: The policies in force.
        policies_changed: Set at their next change.
    """

    def __init__(self, hub: Hub, *, identity: Callable[[str], str] = spiffe_id) -> None:
        """Start with no service.

        Args:
            hub: Where resources go.
            identity: SPIFFE id of a service's servers.
        """
        self._hub = hub
        hub.unknown = self.asked_for
        self._identity = identity
        self._instances: dict[str, Sequence[Instance]] = {}
        self._published: dict[str, frozenset[Key]] = {}
        self._unknown: set[str] = set()
        self.policies = PolicyTable()
        self.policies_changed = asyncio.Event()

    def services(self) -> list[str]:
        """All published services."""
        return sorted(self._published)

    def instances(self, service: str) -> Sequence[Instance]:
        """The known instances of a service."""
        return self._instances.get(service, ())

    def publish(self, services: Iterable[str]) -> None:
        """Publish services even without an instance, so that their callers fail fast instead of waiting."""
        for service in services:
            if service not in self._published:
                self._build(service)

    def asked_for(self, service: str) -> None:
        """Publish a service that a client asked for, within bounds."""
        if service in self._published or not is_service_name(service):
            return
        if len(self._unknown) >= MAX_UNKNOWN:
            log.warning("unknown_service_not_published", asked=service, limit=MAX_UNKNOWN)
            return
        self._unknown.add(service)
        self._build(service)

    def set_instances(self, changes: Mapping[str, Sequence[Instance]]) -> None:
        """Take over the instances of services; others stay as they are."""
        for service, instances in changes.items():
            if instances:
                self._instances[service] = instances
                self._unknown.discard(service)
            else:
                self._instances.pop(service, None)
            self._build(service)

    def set_policies(self, documents: Mapping[str, Document]) -> set[str]:
        """Take over all policies; one that is not valid is refused and the one before stays.

        Returns:
            Services whose policy is another now.
        """
        changed = self.policies.replace(documents)
        for service in changed:
            self._build(service)
        if changed:
            log.info("policies_changed", services=sorted(changed))
            self.policies_changed.set()
            self.policies_changed = asyncio.Event()
        return changed

    def _build(self, service: str) -> None:
        policy = self.policies.of(service)
        resources = build(service, self._instances.get(service, ()), policy, self._identity(service))
        before = self._published.get(service, frozenset())
        self._published[service] = frozenset(resources)
        self._hub.publish(resources, before - resources.keys())
