"""Listeners: the filters of calls to a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.resources import T, ads, duration, pack, route_name

if TYPE_CHECKING:
    from google.protobuf import any_pb2

    from services.mesh.policy.domain import Code, Fault, Policy

_HCM = T + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = T + "envoy.extensions.filters.http.router.v3.Router"
_FAULT = T + "envoy.extensions.filters.http.fault.v3.HTTPFault"
FAULT_FILTER = "fault"
_CODES: dict[Code, int] = {
    "cancelled": 1,
    "unknown": 2,
    "invalid_argument": 3,
    "deadline_exceeded": 4,
    "not_found": 5,
    "already_exists": 6,
    "permission_denied": 7,
    "resource_exhausted": 8,
    "failed_precondition": 9,
    "aborted": 10,
    "out_of_range": 11,
    "unimplemented": 12,
    "internal": 13,
    "unavailable": 14,
    "data_loss": 15,
    "unauthenticated": 16,
}


def listener(service: str, policy: Policy) -> xds_pb2.Listener:
    """The listener of a service; gRPC needs the router to be the last filter."""
    filters = [xds_pb2.HttpFilter(name="router", typed_config=pack(_ROUTER, xds_pb2.Router()))]
    if policy.fault is not None or any(route.fault for route in policy.routes):
        # What is injected stands on the routes; here the filter is only made to exist.
        inactive = pack(_FAULT, xds_pb2.HTTPFault())
        filters.insert(0, xds_pb2.HttpFilter(name=FAULT_FILTER, typed_config=inactive))
    manager = xds_pb2.HttpConnectionManager(
        stat_prefix=service,
        rds=xds_pb2.Rds(config_source=ads(), route_config_name=route_name(service)),
        http_filters=filters,
    )
    return xds_pb2.Listener(name=service, api_listener=xds_pb2.ApiListener(api_listener=pack(_HCM, manager)))


def fault_config(fault: Fault) -> any_pb2.Any:
    """The fault filter's configuration for a route."""
    message = xds_pb2.HTTPFault()
    if fault.delay is not None:
        message.delay.fixed_delay.CopyFrom(duration(fault.delay.duration))
        message.delay.percentage.CopyFrom(_percentage(fault.delay.percent))
    if fault.abort is not None:
        message.abort.grpc_status = _CODES[fault.abort.code]
        message.abort.percentage.CopyFrom(_percentage(fault.abort.percent))
    return pack(_FAULT, message)


def _percentage(percent: float) -> xds_pb2.FractionalPercent:
    return xds_pb2.FractionalPercent(
        numerator=max(1, round(percent * 100)),
        denominator=xds_pb2.FRACTIONAL_PERCENT_DENOMINATOR_TEN_THOUSAND,
    )
