"""Endpoints: the addresses of a cluster, by zone and weight, as seen from a client's zone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.resources import ENDPOINT, Body, Resource, number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from services.mesh.policy.domain import Policy
    from services.mesh.registry.domain import Instance

TOMBSTONE = ("127.0.0.1", 1)
"""Endpoint of a service that has none. Nothing listens there. An empty assignment would leave some clients
calling the old endpoints for ever; a refused connection stops all of them."""

SUBSET_FILTER, SUBSET_KEY = "envoy.lb", "plexus.subset"
"""Where an endpoint of the whole service names its subsets: the edge keeps one cluster a service and chooses
by these, while gRPC's clients are sent to a cluster of the subset."""

Place = tuple[str, int]
"""A zone and a weight: gRPC ignores the weights of endpoints, so every weight is a locality of its own."""
Address = tuple[str, int]


def endpoints(name: str, members: Sequence[Instance], policy: Policy) -> Resource:
    """The endpoints of a cluster.

    Args:
        name: The cluster.
        members: Its instances that serve.
        policy: Of the service.
    """
    places = _places(members)
    subsets = _subsets(members, policy) if name == policy.service else {}
    hashed = policy.lb.policy == "ring_hash"

    def seen(order: list[list[str]]) -> Body:
        return Body.of(ENDPOINT, _assignment(name, places, order, subsets, hashed=hashed))

    everywhere = seen([sorted({zone for zone, _ in places})])
    if policy.locality is None:
        return Resource(everywhere)
    zones = sorted({zone for zone, _ in places})
    viewpoints = sorted({*zones, *policy.locality.failover})
    by_zone = {
        viewpoint: seen(_order(viewpoint, zones, policy.locality.failover.get(viewpoint, ())))
        for viewpoint in viewpoints
    }
    return Resource(everywhere, by_zone)


def _places(members: Iterable[Instance]) -> dict[Place, list[Address]]:
    # Clients refuse an assignment that names an address twice: of two ids with one port, one is gone.
    by_address = {
        (member.address, member.port): (member.zone, member.weight)
        for member in sorted(members, key=lambda entry: entry.id)
    }
    places: dict[Place, list[Address]] = {}
    for address, place in sorted(by_address.items()):
        places.setdefault(place, []).append(address)
    return places or {("local", 1): [TOMBSTONE]}


def _order(viewpoint: str, zones: Sequence[str], failover: Sequence[str]) -> list[list[str]]:
    """Zones by preference: the own one, those named, all the others together.

    Only zones that have instances, since priorities must be dense.
    """
    named = [zone for zone in dict.fromkeys((viewpoint, *failover)) if zone in zones]
    rest = [zone for zone in zones if zone not in named]
    return [*([zone] for zone in named), *([rest] if rest else [])]


def _subsets(members: Iterable[Instance], policy: Policy) -> dict[Address, list[str]]:
    """The subsets that each address belongs to."""
    return {
        (member.address, member.port): names
        for member in members
        if (names := sorted(n for n, s in policy.subsets.items() if s.holds(member.version, member.tags)))
    }


def _assignment(
    name: str,
    places: dict[Place, list[Address]],
    order: list[list[str]],
    subsets: Mapping[Address, list[str]],
    *,
    hashed: bool,
) -> xds_pb2.ClusterLoadAssignment:
    assignment = xds_pb2.ClusterLoadAssignment(cluster_name=name)
    for priority, zones in enumerate(order):
        for (zone, weight), addresses in sorted(places.items()):
            if zone not in zones:
                continue
            # A ring takes the weight of the place for each of its endpoints, round robin for all together.
            share = weight if hashed else weight * len(addresses)
            assignment.endpoints.append(
                xds_pb2.LocalityLbEndpoints(
                    locality=xds_pb2.Locality(
                        region="local" if weight == 1 else f"local-weight-{weight}", zone=zone
                    ),
                    load_balancing_weight=number(share),
                    priority=priority,
                    lb_endpoints=[_endpoint(address, subsets.get(address, ())) for address in addresses],
                )
            )
    return assignment


def _endpoint(address: Address, subsets: Sequence[str]) -> xds_pb2.LbEndpoint:
    host, port = address
    socket = xds_pb2.SocketAddress(address=host, port_value=port)
    endpoint = xds_pb2.LbEndpoint(endpoint=xds_pb2.Endpoint(address=xds_pb2.Address(socket_address=socket)))
    if subsets:
        endpoint.metadata.filter_metadata[SUBSET_FILTER].update({SUBSET_KEY: list(subsets)})
    return endpoint
