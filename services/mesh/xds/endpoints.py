"""Endpoints: the addresses of a cluster, by zone and weight, as seen from a client's zone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.resources import ENDPOINT, Body, Resource, number

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.mesh.policy.domain import Policy
    from services.mesh.registry.domain import Instance

TOMBSTONE = ("127.0.0.1", 1)
"""Endpoint of a service that has none. Nothing listens there. An empty assignment would leave some clients
calling the old endpoints for ever; a refused connection stops all of them."""

Place = tuple[str, int]
"""A zone and a weight: gRPC ignores the weights of endpoints, so every weight is a locality of its own."""
Address = tuple[str, int]


def endpoints(name: str, members: Iterable[Instance], policy: Policy) -> Resource:
    """The endpoints of a cluster.

    Args:
        name: The cluster.
        members: Its instances that serve.
        policy: Of the service.
    """
    places = _places(members)
    hashed = policy.lb.policy == "ring_hash"
    everywhere = Body.of(ENDPOINT, _assignment(name, places, [sorted({zone for zone, _ in places})], hashed))
    if policy.locality is None:
        return Resource(everywhere)
    zones = sorted({zone for zone, _ in places})
    viewpoints = sorted({*zones, *policy.locality.failover})
    by_zone = {
        viewpoint: Body.of(
            ENDPOINT,
            _assignment(
                name, places, _order(viewpoint, zones, policy.locality.failover.get(viewpoint, ())), hashed
            ),
        )
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


def _assignment(
    name: str, places: dict[Place, list[Address]], order: list[list[str]], hashed: bool
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
                    lb_endpoints=[_endpoint(address, port) for address, port in addresses],
                )
            )
    return assignment


def _endpoint(address: str, port: int) -> xds_pb2.LbEndpoint:
    socket = xds_pb2.SocketAddress(address=address, port_value=port)
    return xds_pb2.LbEndpoint(endpoint=xds_pb2.Endpoint(address=xds_pb2.Address(socket_address=socket)))
