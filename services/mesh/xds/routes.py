"""Routes: which calls go where, and how long and how often they are tried."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.listeners import FAULT_FILTER, fault_config
from services.mesh.xds.resources import (
    ROUTE,
    Body,
    Library,
    Resource,
    duration,
    number,
    route_name,
    subset_cluster,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from services.mesh.policy.domain import Fault, HeaderMatch, Match, Policy, Retry


CORE_SKEW = timedelta(seconds=2)
"""C-core (1.85) takes the start of a call from another clock than its timers, one to two seconds behind them,
and so ends calls that much too early, or at once; with this added they end up to a second late."""


def routes(service: str, policy: Policy, alive: AbstractSet[str]) -> Resource:
    """The route configuration of a service.

    Args:
        service: Its name.
        policy: Its policy.
        alive: Subsets that have an instance to serve; the others get no share while any of them is alive.
    """
    body = Body.of(ROUTE, _configuration(service, policy, alive, timedelta()))
    if policy.timeout is None and not any(route.timeout for route in policy.routes):
        return Resource(body)
    late = Body.of(ROUTE, _configuration(service, policy, alive, CORE_SKEW))
    return Resource(body, by_library={Library.CORE: late})


def _configuration(
    service: str, policy: Policy, alive: AbstractSet[str], skew: timedelta
) -> xds_pb2.RouteConfiguration:
    def late(timeout: timedelta | None) -> timedelta | None:
        return None if timeout is None else timeout + skew

    defaults = {name: subset.weight for name, subset in policy.subsets.items()}
    made = [
        _route(
            policy,
            _match(entry.match),
            weights=_living(defaults if entry.subsets is None else entry.subsets, alive),
            timeout=late(entry.timeout or policy.timeout),
            retry=entry.retry or policy.retry,
            fault=entry.fault or policy.fault,
        )
        for entry in policy.routes
    ]
    made.append(
        _route(
            policy,
            xds_pb2.RouteMatch(prefix=""),
            weights=_living(defaults, alive),
            timeout=late(policy.timeout),
            retry=policy.retry,
            fault=policy.fault,
        )
    )
    host = xds_pb2.VirtualHost(name=service, domains=["*"], routes=made)
    return xds_pb2.RouteConfiguration(name=route_name(service), virtual_hosts=[host])


def _living(weights: Mapping[str, int], alive: AbstractSet[str]) -> dict[str, int]:
    """The shares of subsets that can serve; when none can, the shares as they are."""
    wanted = {name: weight for name, weight in sorted(weights.items()) if weight}
    return {name: weight for name, weight in wanted.items() if name in alive} or wanted


def _route(
    policy: Policy,
    match: xds_pb2.RouteMatch,
    *,
    weights: Mapping[str, int],
    timeout: timedelta | None,
    retry: Retry,
    fault: Fault | None,
) -> xds_pb2.Route:
    # On the route: Java ignores a retry policy of the virtual host.
    action = xds_pb2.RouteAction(retry_policy=_retry(retry))
    if not weights:
        action.cluster = policy.service
    elif len(weights) == 1:
        action.cluster = subset_cluster(policy.service, next(iter(weights)))
    else:
        for name, weight in weights.items():
            entry = action.weighted_clusters.clusters.add(name=subset_cluster(policy.service, name))
            entry.weight.CopyFrom(number(weight))
    if timeout is not None:
        # RouteAction.timeout is ignored by gRPC.
        action.max_stream_duration.max_stream_duration.CopyFrom(duration(timeout))
    if policy.lb.header is not None:
        action.hash_policy.add(header=xds_pb2.HashPolicyHeader(header_name=policy.lb.header))
    overrides = {} if fault is None else {FAULT_FILTER: fault_config(fault)}
    return xds_pb2.Route(match=match, route=action, typed_per_filter_config=overrides)


def _retry(retry: Retry) -> xds_pb2.RetryPolicy | None:
    if retry.attempts == 1:
        return None  # zero retries are refused by all and kill every call in Java
    return xds_pb2.RetryPolicy(
        retry_on=",".join(code.replace("_", "-") for code in retry.codes),
        num_retries=number(retry.attempts - 1),
        retry_back_off=xds_pb2.RetryBackOff(
            base_interval=duration(retry.backoff.base), max_interval=duration(retry.backoff.max)
        ),
    )


def _match(match: Match) -> xds_pb2.RouteMatch:
    message = xds_pb2.RouteMatch(headers=map(_header, match.headers))
    if match.method is not None:
        message.path = match.method
    else:
        message.prefix = match.prefix or ""
    return message


def _header(header: HeaderMatch) -> xds_pb2.HeaderMatcher:
    message = xds_pb2.HeaderMatcher(name=header.name, invert_match=header.invert)
    if header.present is not None:
        message.present_match = header.present
        return message
    for kind in ("exact", "prefix", "suffix", "contains"):
        text = getattr(header, kind)
        if text is not None:
            message.string_match.CopyFrom(xds_pb2.StringMatcher(**{kind: text}))
    return message
