"""The pure function at the heart of the control plane: instances and rules in, xDS resources out.

The resources are the ones that C-core, Go, Java and Node all accept; each odd choice below is a rule that one
of them needs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf import any_pb2, duration_pb2, wrappers_pb2

from plexus.xds.v1 import xds_pb2
from services.mesh.bootstrap import CERTIFICATE_PROVIDER
from services.mesh.registry.domain import Health
from services.mesh.trust.domain import spiffe_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.message import Message

    from services.mesh.registry.domain import Instance

_T = "type.googleapis.com/"
LISTENER = _T + "envoy.config.listener.v3.Listener"
ROUTE = _T + "envoy.config.route.v3.RouteConfiguration"
CLUSTER = _T + "envoy.config.cluster.v3.Cluster"
ENDPOINT = _T + "envoy.config.endpoint.v3.ClusterLoadAssignment"
_HCM = _T + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = _T + "envoy.extensions.filters.http.router.v3.Router"
_TLS = _T + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"

PUSH_ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
"""Make before break: what is referred to goes before what refers to it."""

TOMBSTONE = ("127.0.0.1", 1)
"""Endpoint of a service that has none. Nothing listens there. An empty assignment would leave some clients
calling the old endpoints for ever; a refused connection stops all of them."""


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """How callers treat a service.

    Attributes:
        retry_on: gRPC codes in lower case, comma separated.
        retries: Attempts beyond the first, at least 1.
        max_requests: Concurrent calls of one client to the service.
    """

    retry_on: str = "unavailable"
    retries: int = 2
    max_requests: int = 1024


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All resources of a moment.

    Attributes:
        resources: Type URL -> resource name -> packed resource.
        versions: Type URL -> digest of its resources; equal content has an equal version.
    """

    resources: Mapping[str, Mapping[str, any_pb2.Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def build(
    instances: Iterable[Instance],
    services: Iterable[str],
    policies: Mapping[str, TrafficPolicy] | None = None,
) -> Snapshot:
    """Build the resources of every known service.

    Args:
        instances: Who runs.
        services: Names that are published even without an instance, so that their callers fail fast instead
            of waiting for a resource that does not come.
        policies: By service; the default policy for the others.
    """
    by_service: dict[str, list[Instance]] = {name: [] for name in services}
    for instance in instances:
        by_service.setdefault(instance.service, []).append(instance)
    resources: dict[str, dict[str, any_pb2.Any]] = {url: {} for url in PUSH_ORDER}
    for service, members in sorted(by_service.items()):
        policy = (policies or {}).get(service, TrafficPolicy())
        resources[LISTENER][service] = _pack(LISTENER, _listener(service))
        resources[ROUTE][_route_name(service)] = _pack(ROUTE, _route(service, policy))
        resources[CLUSTER][service] = _pack(CLUSTER, _cluster(service, policy))
        resources[ENDPOINT][service] = _pack(ENDPOINT, _endpoints(service, members))
    return Snapshot(resources, {url: _version(named) for url, named in resources.items()})


def _version(named: Mapping[str, any_pb2.Any]) -> str:
    digest = hashlib.sha256()
    for name, resource in sorted(named.items()):
        digest.update(name.encode())
        digest.update(resource.value)
    return digest.hexdigest()[:16]


def _pack(type_url: str, message: Message) -> any_pb2.Any:
    # Deterministic, so that equal resources have equal versions.
    return any_pb2.Any(type_url=type_url, value=message.SerializeToString(deterministic=True))


def _number(value: int) -> wrappers_pb2.UInt32Value:
    return wrappers_pb2.UInt32Value(value=value)


def _milliseconds(value: int) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(value)
    return duration


def _ads() -> xds_pb2.ConfigSource:
    return xds_pb2.ConfigSource(ads=xds_pb2.AggregatedConfigSource())


def _route_name(service: str) -> str:
    return f"{service}-route"


def _listener(service: str) -> xds_pb2.Listener:
    router = xds_pb2.HttpFilter(name="router", typed_config=_pack(_ROUTER, xds_pb2.Router()))
    manager = xds_pb2.HttpConnectionManager(
        stat_prefix=service,
        rds=xds_pb2.Rds(config_source=_ads(), route_config_name=_route_name(service)),
        http_filters=[router],
    )
    return xds_pb2.Listener(name=service, api_listener=xds_pb2.ApiListener(api_listener=_pack(_HCM, manager)))


def _route(service: str, policy: TrafficPolicy) -> xds_pb2.RouteConfiguration:
    # On the route: Java ignores a retry policy of the virtual host.
    retry = xds_pb2.RetryPolicy(
        retry_on=policy.retry_on,
        num_retries=_number(policy.retries),
        retry_back_off=xds_pb2.RetryBackOff(base_interval=_milliseconds(25), max_interval=_milliseconds(250)),
    )
    route = xds_pb2.Route(
        match=xds_pb2.RouteMatch(prefix=""), route=xds_pb2.RouteAction(cluster=service, retry_policy=retry)
    )
    host = xds_pb2.VirtualHost(name=service, domains=["*"], routes=[route])
    return xds_pb2.RouteConfiguration(name=_route_name(service), virtual_hosts=[host])


def _cluster(service: str, policy: TrafficPolicy) -> xds_pb2.Cluster:
    provider = xds_pb2.CertificateProvider(instance_name=CERTIFICATE_PROVIDER, certificate_name="default")
    name = xds_pb2.StringMatcher(exact=spiffe_id(service))
    tls = xds_pb2.UpstreamTlsContext(
        common_tls_context=xds_pb2.CommonTlsContext(
            tls_certificate_provider_instance=provider,
            validation_context=xds_pb2.CertificateValidationContext(
                ca_certificate_provider_instance=provider,
                # Both: gRPC enforces only the first, Envoy only the second.
                match_subject_alt_names=[name],
                match_typed_subject_alt_names=[
                    xds_pb2.SubjectAltNameMatcher(san_type=xds_pb2.SAN_TYPE_URI, matcher=name)
                ],
            ),
        )
    )
    return xds_pb2.Cluster(
        name=service,
        type=xds_pb2.DISCOVERY_TYPE_EDS,
        eds_cluster_config=xds_pb2.EdsClusterConfig(eds_config=_ads(), service_name=service),
        connect_timeout=_milliseconds(5000),
        circuit_breakers=xds_pb2.CircuitBreakers(
            thresholds=[xds_pb2.Thresholds(max_requests=_number(policy.max_requests))]
        ),
        outlier_detection=xds_pb2.OutlierDetection(
            interval=_milliseconds(1000),
            base_ejection_time=_milliseconds(5000),
            max_ejection_percent=_number(50),
            # Unset it defaults to 100, and Node's detector then dies when there was no traffic.
            enforcing_success_rate=_number(0),
            failure_percentage_threshold=_number(50),
            enforcing_failure_percentage=_number(100),
            failure_percentage_minimum_hosts=_number(2),
            failure_percentage_request_volume=_number(5),
        ),
        transport_socket=xds_pb2.TransportSocket(
            name="envoy.transport_sockets.tls", typed_config=_pack(_TLS, tls)
        ),
    )


def _endpoints(service: str, members: list[Instance]) -> xds_pb2.ClusterLoadAssignment:
    # gRPC ignores the weights of endpoints, so every weight of a zone is a locality of its own.
    # Clients refuse an assignment that names an address twice: of two ids with one port, one is gone.
    serving = {
        (member.address, member.port): (member.zone, member.weight)
        for member in sorted(members, key=lambda entry: entry.id)
        if member.health is Health.SERVING
    }
    places: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for address, place in serving.items():
        places.setdefault(place, set()).add(address)
    if not places:
        places[("local", 1)] = {TOMBSTONE}
    assignment = xds_pb2.ClusterLoadAssignment(cluster_name=service)
    for (zone, weight), addresses in sorted(places.items()):
        region = "local" if weight == 1 else f"local-weight-{weight}"
        assignment.endpoints.append(
            xds_pb2.LocalityLbEndpoints(
                locality=xds_pb2.Locality(region=region, zone=zone),
                load_balancing_weight=_number(weight * len(addresses)),
                lb_endpoints=[_endpoint(address, port) for address, port in sorted(addresses)],
            )
        )
    return assignment


def _endpoint(address: str, port: int) -> xds_pb2.LbEndpoint:
    socket = xds_pb2.SocketAddress(address=address, port_value=port)
    return xds_pb2.LbEndpoint(endpoint=xds_pb2.Endpoint(address=xds_pb2.Address(socket_address=socket)))
