"""Resources are pure functions of instances and policy, and obey the rules of all client libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from plexus.xds.v1 import xds_pb2
from services.mesh.policy.domain import Document, Policy
from services.mesh.policy.parse import parse
from services.mesh.registry.domain import Health
from services.mesh.trust.domain import spiffe_id
from services.mesh.xds import build as building
from services.mesh.xds.clusters import cluster
from services.mesh.xds.endpoints import TOMBSTONE
from services.mesh.xds.resources import CLUSTER, ENDPOINT, LISTENER, ROUTE, Body, Library
from tests.contracts.registry import instance
from tests.mesh.policies import EVERYTHING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.mesh.registry.domain import Instance
    from services.mesh.xds.resources import Key, Resource

DEFAULT = Policy(service="vectors")


def build(instances: Iterable[Instance], policy: Policy = DEFAULT) -> dict[Key, Resource]:
    return building.build("vectors", instances, policy, spiffe_id("vectors"))


def policy(text: str) -> Policy:
    return parse(Document("vectors.yaml", f"service: vectors\n{text}"))


def assignment(
    resources: dict[Key, Resource], name: str = "vectors", zone: str = "local"
) -> xds_pb2.ClusterLoadAssignment:
    return xds_pb2.ClusterLoadAssignment.FromString(resources[ENDPOINT, name].seen_from(zone).any.value)


def addresses(message: xds_pb2.ClusterLoadAssignment) -> list[tuple[str, int]]:
    return [
        (entry.endpoint.address.socket_address.address, entry.endpoint.address.socket_address.port_value)
        for place in message.endpoints
        for entry in place.lb_endpoints
    ]


def routes(resources: dict[Key, Resource]) -> list[xds_pb2.Route]:
    body = resources[ROUTE, "vectors-route"].body
    (host,) = xds_pb2.RouteConfiguration.FromString(body.any.value).virtual_hosts
    return list(host.routes)


def manager(resources: dict[Key, Resource]) -> xds_pb2.HttpConnectionManager:
    listener = xds_pb2.Listener.FromString(resources[LISTENER, "vectors"].body.any.value)
    return xds_pb2.HttpConnectionManager.FromString(listener.api_listener.api_listener.value)


def test_equal_input_gives_equal_resources_and_only_endpoints_follow_instances() -> None:
    first, again, grown = build([instance()]), build([instance()]), build([instance(), instance(2)])
    assert all(resource.same_as(again[key]) for key, resource in first.items())
    changed = [key for key, resource in first.items() if not resource.same_as(grown[key])]
    assert changed == [(ENDPOINT, "vectors")]


def test_serving_instances_are_endpoints_and_draining_ones_are_not() -> None:
    draining = replace(instance(2), health=Health.DRAINING)
    assert addresses(assignment(build([instance(1), draining]))) == [("127.0.0.1", 4001)]


@pytest.mark.parametrize("policy", [DEFAULT, EVERYTHING])
def test_no_assignment_is_ever_empty(policy: Policy) -> None:
    resources = build([], policy)
    for (kind, _name), resource in resources.items():
        if kind == ENDPOINT:
            for body in (resource.body, *resource.by_zone.values()):
                message = xds_pb2.ClusterLoadAssignment.FromString(body.any.value)
                assert addresses(message) == [TOMBSTONE]


def test_one_address_appears_once() -> None:
    twin = replace(instance(2), port=4001)
    assert addresses(assignment(build([instance(), twin]))) == [("127.0.0.1", 4001)]
    elsewhere = replace(twin, weight=5, zone="b")
    assert addresses(assignment(build([instance(), elsewhere]))) == [("127.0.0.1", 4001)]


def test_localities_are_named_weighted_and_their_priorities_dense() -> None:
    members = [
        replace(instance(number), zone=zone, weight=weight)
        for number, (zone, weight) in enumerate([("a", 1), ("b", 9), ("b", 1), ("c", 2)])
    ]
    resources = build(members, policy("locality: {failover: {b: [x, c]}}"))
    for viewpoint in ("a", "b", "c", "x", "elsewhere"):
        places = assignment(resources, zone=viewpoint).endpoints
        assert all(place.HasField("locality") for place in places)
        assert all(place.load_balancing_weight.value >= 1 for place in places)
        priorities = {place.priority for place in places}
        assert priorities == set(range(len(priorities)))
        assert len({(p.priority, p.locality.region, p.locality.zone) for p in places}) == len(places)

    def order(viewpoint: str) -> list[tuple[int, str]]:
        places = assignment(resources, zone=viewpoint).endpoints
        return sorted({(place.priority, place.locality.zone) for place in places})

    assert order("a") == [(0, "a"), (1, "b"), (1, "c")]
    assert order("b") == [(0, "b"), (1, "c"), (2, "a")]
    assert order("elsewhere") == [(0, "a"), (0, "b"), (0, "c")]


def test_the_weight_of_a_place_counts_its_endpoints_except_on_a_ring() -> None:
    members = [instance(1), instance(2), replace(instance(3), weight=9)]
    plain = assignment(build(members)).endpoints
    assert sorted(place.load_balancing_weight.value for place in plain) == [2, 9]
    ring = assignment(build(members, policy("lb: {policy: ring_hash, header: x-user}"))).endpoints
    assert sorted(place.load_balancing_weight.value for place in ring) == [1, 9]


@pytest.mark.parametrize("policy", [DEFAULT, EVERYTHING])
def test_every_cluster_demands_the_servers_identity_in_both_forms_and_sets_no_tls_parameters(
    policy: Policy,
) -> None:
    expected = "spiffe://plexus.local/ns/default/dc/local/svc/vectors"
    clusters = [resource for (kind, _), resource in build([instance()], policy).items() if kind == CLUSTER]
    assert clusters
    for resource in clusters:
        message = xds_pb2.Cluster.FromString(resource.body.any.value)
        assert message.type == xds_pb2.DISCOVERY_TYPE_EDS
        assert message.eds_cluster_config.eds_config.HasField("ads")
        # Of least request and random some libraries refuse each; unspecified is round robin.
        assert message.lb_policy in {xds_pb2.LB_POLICY_UNSPECIFIED, xds_pb2.LB_POLICY_RING_HASH}
        tls = xds_pb2.UpstreamTlsContext.FromString(message.transport_socket.typed_config.value)
        common = tls.common_tls_context
        assert common.tls_certificate_provider_instance.instance_name == "plexus"
        context = common.validation_context
        assert context.ca_certificate_provider_instance.instance_name == "plexus"
        assert [matcher.exact for matcher in context.match_subject_alt_names] == [expected]
        assert [matcher.matcher.exact for matcher in context.match_typed_subject_alt_names] == [expected]


def test_a_cluster_without_an_identity_is_never_made() -> None:
    with pytest.raises(ValueError, match="identity"):
        cluster("vectors", DEFAULT, "")


@pytest.mark.parametrize("policy", [DEFAULT, EVERYTHING])
def test_outliers_are_judged_by_percentage_alone_and_success_rate_is_off(policy: Policy) -> None:
    message = xds_pb2.Cluster.FromString(build([], policy)[CLUSTER, "vectors"].body.any.value)
    rules = message.outlier_detection
    assert rules.HasField("enforcing_success_rate")
    assert rules.enforcing_success_rate.value == 0
    assert rules.enforcing_failure_percentage.value == 100


@pytest.mark.parametrize("policy", [DEFAULT, EVERYTHING])
def test_filters_are_known_to_grpc_and_the_router_is_the_last(policy: Policy) -> None:
    kinds = [
        entry.typed_config.type_url.rpartition("/")[2] for entry in manager(build([], policy)).http_filters
    ]
    assert kinds[-1] == "envoy.extensions.filters.http.router.v3.Router"
    assert set(kinds[:-1]) <= {"envoy.extensions.filters.http.fault.v3.HTTPFault"}


@pytest.mark.parametrize("policy", [DEFAULT, EVERYTHING])
def test_every_route_has_its_retry_policy_and_its_deadline_where_all_libraries_look(policy: Policy) -> None:
    made = routes(build([instance()], policy))
    assert made[-1].match.HasField("prefix")
    assert made[-1].match.prefix == ""
    for route in made:
        assert route.route.retry_policy.num_retries.value >= 1
        if policy is EVERYTHING:
            assert route.route.max_stream_duration.max_stream_duration.ToMilliseconds() > 0


def test_one_attempt_means_no_retry_policy_since_zero_retries_are_refused() -> None:
    (route,) = routes(build([], policy("retry: {attempts: 1}")))
    assert not route.route.HasField("retry_policy")


def shares(resources: dict[Key, Resource]) -> dict[str, int]:
    action = routes(resources)[-1].route
    if action.cluster:
        return {action.cluster: 1}
    return {entry.name: entry.weight.value for entry in action.weighted_clusters.clusters}


CANARY = "subsets: {stable: {version: '1.*', weight: 90}, canary: {version: '2.*', weight: 10}}"


def test_a_subset_has_a_cluster_of_its_own_and_gets_its_share_once_it_has_an_instance() -> None:
    stable, canary = replace(instance(1), version="1.9"), replace(instance(2), version="2.0")
    both = build([stable, canary], policy(CANARY))
    assert shares(both) == {"vectors~canary": 10, "vectors~stable": 90}
    assert addresses(assignment(both, "vectors~canary")) == [("127.0.0.1", 4002)]
    assert addresses(assignment(both, "vectors~stable")) == [("127.0.0.1", 4001)]
    assert len(addresses(assignment(both))) == 2
    assert shares(build([stable], policy(CANARY))) == {"vectors~stable": 1}
    assert shares(build([], policy(CANARY))) == {"vectors~canary": 10, "vectors~stable": 90}


def test_a_body_is_encoded_as_the_responses_element() -> None:
    body = Body.of(ENDPOINT, xds_pb2.ClusterLoadAssignment(cluster_name="x"))
    response = xds_pb2.DiscoveryResponse.FromString(body.frame * 2)
    assert list(response.resources) == [body.any, body.any]


def test_clients_on_c_core_get_deadlines_that_allow_for_their_two_clocks() -> None:
    made = build([], policy("timeout: 1s"))[ROUTE, "vectors-route"]

    def timeout_ms(library: Library | None) -> int:
        value = made.seen_from(library=library).any.value
        (host,) = xds_pb2.RouteConfiguration.FromString(value).virtual_hosts
        return host.routes[0].route.max_stream_duration.max_stream_duration.ToMilliseconds()

    assert [timeout_ms(library) for library in (None, Library.JAVA, Library.CORE)] == [1000, 1000, 3000]
    assert build([], DEFAULT)[ROUTE, "vectors-route"].by_library == {}


def test_clients_in_java_get_no_outlier_detection_which_loses_their_calls() -> None:
    made = build([], DEFAULT)[CLUSTER, "vectors"]

    def detects(library: Library | None) -> bool:
        message = xds_pb2.Cluster.FromString(made.seen_from(library=library).any.value)
        assert message.HasField("transport_socket")
        return message.HasField("outlier_detection")

    assert [detects(library) for library in (None, Library.CORE, Library.JAVA)] == [True, True, False]
    assert Library.of("gRPC Java") is Library.JAVA
    assert Library.of("gRPC Go") is None


def test_by_default_a_call_that_a_stopping_server_cancels_is_tried_again() -> None:
    (route,) = routes(build([], DEFAULT))
    assert route.route.retry_policy.retry_on == "unavailable,cancelled"
