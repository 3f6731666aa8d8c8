"""The snapshot is a pure function whose resources obey the rules of all client libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from plexus.xds.v1 import xds_pb2
from services.mesh.registry.domain import Health
from services.mesh.snapshot import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE, TOMBSTONE, build
from tests.contracts.registry import instance

if TYPE_CHECKING:
    from services.mesh.registry.domain import Instance


def endpoints(instances: list[Instance], service: str = "vectors") -> list[tuple[str, int]]:
    packed = build(instances, [service]).resources[ENDPOINT][service]
    assignment = xds_pb2.ClusterLoadAssignment.FromString(packed.value)
    assert all(place.load_balancing_weight.value > 0 for place in assignment.endpoints)
    return [
        (entry.endpoint.address.socket_address.address, entry.endpoint.address.socket_address.port_value)
        for place in assignment.endpoints
        for entry in place.lb_endpoints
    ]


def test_equal_input_gives_equal_versions_and_only_endpoints_follow_instances() -> None:
    first, again = build([instance()], ["vectors"]), build([instance()], ["vectors"])
    assert first.versions == again.versions
    grown = build([instance(), instance(2)], ["vectors"])
    changed = {url for url in PUSH_ORDER if grown.versions[url] != first.versions[url]}
    assert changed == {ENDPOINT}


def test_serving_instances_are_endpoints_and_draining_ones_are_not() -> None:
    draining = replace(instance(2), health=Health.DRAINING)
    assert endpoints([instance(1), draining]) == [("127.0.0.1", 4001)]


def test_a_service_without_instances_gets_a_tombstone_not_an_empty_assignment() -> None:
    assert endpoints([]) == [TOMBSTONE]


def test_one_address_appears_once() -> None:
    twin = replace(instance(2), port=4001)
    assert endpoints([instance(), twin]) == [("127.0.0.1", 4001)]
    assert endpoints([instance(), replace(twin, weight=5, zone="b")]) == [("127.0.0.1", 4001)]


def test_weights_become_localities() -> None:
    heavy = replace(instance(2), weight=9)
    packed = build([instance(), heavy], ["vectors"]).resources[ENDPOINT]["vectors"]
    assignment = xds_pb2.ClusterLoadAssignment.FromString(packed.value)
    assert sorted(place.load_balancing_weight.value for place in assignment.endpoints) == [1, 9]


def test_the_server_identity_is_matched_in_both_forms() -> None:
    cluster = xds_pb2.Cluster.FromString(build([], ["vectors"]).resources[CLUSTER]["vectors"].value)
    tls = xds_pb2.UpstreamTlsContext.FromString(cluster.transport_socket.typed_config.value)
    context = tls.common_tls_context.validation_context
    expected = "spiffe://plexus.local/ns/default/dc/local/svc/vectors"
    assert [matcher.exact for matcher in context.match_subject_alt_names] == [expected]
    assert [matcher.matcher.exact for matcher in context.match_typed_subject_alt_names] == [expected]
    assert cluster.outlier_detection.HasField("enforcing_success_rate")
    assert cluster.outlier_detection.enforcing_success_rate.value == 0


def test_the_retry_policy_is_on_the_route_and_the_router_is_the_last_filter() -> None:
    snapshot = build([], ["vectors"])
    listener = xds_pb2.Listener.FromString(snapshot.resources[LISTENER]["vectors"].value)
    manager = xds_pb2.HttpConnectionManager.FromString(listener.api_listener.api_listener.value)
    assert manager.http_filters[-1].typed_config.type_url.endswith(".router.v3.Router")
    routes = xds_pb2.RouteConfiguration.FromString(
        snapshot.resources[ROUTE][manager.rds.route_config_name].value
    )
    (route,) = routes.virtual_hosts[0].routes
    assert route.route.retry_policy.num_retries.value >= 1
    assert route.match.HasField("prefix")
