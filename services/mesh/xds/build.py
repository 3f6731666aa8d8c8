"""All resources of one service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.mesh.registry.domain import Health
from services.mesh.xds.clusters import cluster
from services.mesh.xds.endpoints import endpoints
from services.mesh.xds.listeners import listener
from services.mesh.xds.resources import (
    CLUSTER,
    ENDPOINT,
    LISTENER,
    ROUTE,
    Body,
    Key,
    Resource,
    route_name,
    subset_cluster,
)
from services.mesh.xds.routes import routes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.mesh.policy.domain import Policy
    from services.mesh.registry.domain import Instance


def build(service: str, instances: Iterable[Instance], policy: Policy, identity: str) -> dict[Key, Resource]:
    """Build what the callers of a service need.

    Args:
        service: Its name.
        instances: Its instances; those that do not serve are left out.
        policy: How it is called.
        identity: SPIFFE id of its servers.
    """
    serving = [instance for instance in instances if instance.health is Health.SERVING]
    subsets = {
        name: [member for member in serving if subset.holds(member.version, member.tags)]
        for name, subset in policy.subsets.items()
    }
    alive = {name for name, members in subsets.items() if members}
    resources = {
        (LISTENER, service): Resource(Body.of(LISTENER, listener(service, policy))),
        (ROUTE, route_name(service)): routes(service, policy, alive),
    }
    # The whole service stays a cluster beside its subsets: the edge and old routes of clients name it.
    named = {service: serving} | {subset_cluster(service, name): members for name, members in subsets.items()}
    for name, members in named.items():
        resources[CLUSTER, name] = cluster(name, policy, identity)
        resources[ENDPOINT, name] = endpoints(name, members, policy)
    return resources
