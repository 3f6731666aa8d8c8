"""Traffic policies at the edge: the routes that the control plane tells every client, followed and read.

Of a route the edge takes over the condition (method, headers) and where calls go (shares of subsets).
Timeouts, retries and limits at the edge are those of kong.yml.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
from google.protobuf import json_format

from plexus.xds.v1 import xds_pb2
from services.mesh.ads.servicer import METHOD, SERVICE
from services.mesh.direct import control_channel
from services.mesh.xds.resources import ROUTE, SUBSET_MARK, route_name, service_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.mesh.trust.domain import Identity

log = structlog.get_logger(__name__)

_STREAM_S = 3600.0
"""A stream is opened anew this often, so that a rotated certificate counts."""
_RETRY_MIN_S, _RETRY_MAX_S = 0.2, 5.0
NODE = "edge-routes"


@dataclass(frozen=True, slots=True)
class Way:
    """Where calls of a service go that meet a condition.

    Attributes:
        method: Path of a gRPC method; empty: any.
        prefix: What the path begins with, if `method` is empty.
        headers: Envoy's header matchers as JSON, all of which hold.
        shares: Subsets and their weights; none: any instance.
    """

    method: str
    prefix: str
    headers: tuple[dict[str, Any], ...]
    shares: tuple[tuple[str, int], ...]

    def takes(self, path: str) -> bool:
        """Whether a gRPC method's path meets the condition on it."""
        return path == self.method if self.method else path.startswith(self.prefix)

    @property
    def any_path(self) -> bool:
        """Whether every method does."""
        return not self.method and not self.prefix


def ways(config: xds_pb2.RouteConfiguration) -> tuple[Way, ...]:
    """A service's ways in the order in which they count; none if all calls go to any instance."""
    found = tuple(_way(route) for host in config.virtual_hosts for route in host.routes)
    return found if any(way.shares for way in found) else ()


def _way(route: xds_pb2.Route) -> Way:
    action = route.route
    if action.WhichOneof("cluster_specifier") == "weighted_clusters":
        named = [(entry.name, entry.weight.value) for entry in action.weighted_clusters.clusters]
    else:
        named = [(action.cluster, 1)]
    shares = [(name.partition(SUBSET_MARK)[2], weight) for name, weight in named]
    headers = (
        json_format.MessageToDict(each, preserving_proto_field_name=True) for each in route.match.headers
    )
    return Way(
        method=route.match.path,
        prefix=route.match.prefix,
        headers=tuple(headers),
        shares=tuple((subset, weight) for subset, weight in shares if subset),
    )


async def follow(
    controls: Sequence[tuple[str, int]], identity: Identity, services: Sequence[str]
) -> AsyncIterator[dict[str, tuple[Way, ...]]]:
    """The ways of services, at first and after each change; only those that were told.

    While no control plane answers nothing is told, and what was known holds.

    Args:
        controls: Host and port of each control plane.
        identity: The edge's.
        services: Whose.
    """
    failures = 0
    while True:
        host, port = controls[failures % len(controls)]
        try:
            async with control_channel(host, port, identity) as channel:
                async for told in _stream(channel, services):
                    if failures:
                        log.info("edge_routes_found", after_failures=failures)
                    failures = 0
                    yield told
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                continue
            failures += 1
            if failures == 1:
                log.warning("edge_routes_not_followed", code=error.code().name)
        longest = min(_RETRY_MAX_S, _RETRY_MIN_S * 2 ** min(failures, 16))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only


async def _stream(
    channel: grpc.aio.Channel, services: Sequence[str]
) -> AsyncIterator[dict[str, tuple[Way, ...]]]:
    open_stream = channel.stream_stream(
        f"/{SERVICE}/{METHOD}",
        request_serializer=xds_pb2.DiscoveryRequest.SerializeToString,
        response_deserializer=xds_pb2.DiscoveryResponse.FromString,
    )
    call = open_stream(timeout=_STREAM_S)
    request = xds_pb2.DiscoveryRequest(
        node=xds_pb2.Node(id=NODE, user_agent_name="plexus edge"),
        type_url=ROUTE,
        resource_names=[route_name(service) for service in services],
    )
    await _write(call, request)
    async for response in call:
        told = {}
        for resource in response.resources:
            config = xds_pb2.RouteConfiguration.FromString(resource.value)
            told[service_of(ROUTE, config.name)] = ways(config)
        yield told
        # Accepted only once who follows has taken it over.
        request.version_info, request.response_nonce = response.version_info, response.nonce
        await _write(call, request)


async def _write(call: Any, request: xds_pb2.DiscoveryRequest) -> None:
    # The stream may have ended meanwhile; the next read says how.
    with contextlib.suppress(asyncio.InvalidStateError):
        await call.write(request)
