"""Clusters: how callers connect to a service or to a subset of it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from google.protobuf import wrappers_pb2

from plexus.xds.v1 import xds_pb2
from services.mesh.bootstrap import CERTIFICATE_PROVIDER
from services.mesh.xds.resources import CLUSTER, Body, Library, Resource, T, ads, duration, number, pack

if TYPE_CHECKING:
    from services.mesh.policy.domain import OutlierDetection, Policy

_TLS = T + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_CONNECT_TIMEOUT = timedelta(seconds=5)


def cluster(name: str, policy: Policy, identity: str) -> Resource:
    """A cluster.

    Args:
        name: Its name and that of its endpoints.
        policy: Of the service.
        identity: SPIFFE id that its servers must have.

    Raises:
        ValueError: The identity is empty, which would accept any server of the mesh.
    """
    message = _cluster(name, policy, identity)
    body = Body.of(CLUSTER, message)
    if policy.outlier_detection is None:
        return Resource(body)
    # grpc-java (1.85) with outlier detection may pick an endpoint that is just being taken away; it then
    # fails over the count of the call's end, and the call hangs for ever, beyond its deadline.
    message.ClearField("outlier_detection")
    return Resource(body, by_library={Library.JAVA: Body.of(CLUSTER, message)})


def _cluster(name: str, policy: Policy, identity: str) -> xds_pb2.Cluster:
    message = xds_pb2.Cluster(
        name=name,
        type=xds_pb2.DISCOVERY_TYPE_EDS,
        eds_cluster_config=xds_pb2.EdsClusterConfig(eds_config=ads(), service_name=name),
        connect_timeout=duration(_CONNECT_TIMEOUT),
        circuit_breakers=xds_pb2.CircuitBreakers(
            thresholds=[xds_pb2.Thresholds(max_requests=number(policy.circuit_breaker.max_requests))]
        ),
        transport_socket=_tls(identity),
    )
    if policy.outlier_detection is not None:
        message.outlier_detection.CopyFrom(_outliers(policy.outlier_detection))
    if policy.lb.policy == "ring_hash":
        message.lb_policy = xds_pb2.LB_POLICY_RING_HASH
        size = wrappers_pb2.UInt64Value(value=policy.lb.min_ring_size)
        message.ring_hash_lb_config.minimum_ring_size.CopyFrom(size)
    return message


def _outliers(rules: OutlierDetection) -> xds_pb2.OutlierDetection:
    # By failure percentage alone: gRPC ignores consecutive failures.
    return xds_pb2.OutlierDetection(
        interval=duration(rules.interval),
        base_ejection_time=duration(rules.ejection),
        max_ejection_percent=number(rules.max_ejected_percent),
        # Unset it defaults to 100, and Node's detector then dies when there was no traffic.
        enforcing_success_rate=number(0),
        failure_percentage_threshold=number(rules.failure_percent),
        enforcing_failure_percentage=number(100),
        failure_percentage_minimum_hosts=number(rules.min_hosts),
        failure_percentage_request_volume=number(rules.min_requests),
    )


def _tls(identity: str) -> xds_pb2.TransportSocket:
    if not identity:
        raise ValueError("a cluster without an identity would accept any server of the mesh")
    provider = xds_pb2.CertificateProvider(instance_name=CERTIFICATE_PROVIDER, certificate_name="default")
    name = xds_pb2.StringMatcher(exact=identity)
    context = xds_pb2.UpstreamTlsContext(
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
    return xds_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=pack(_TLS, context))
