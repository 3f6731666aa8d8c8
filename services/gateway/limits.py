"""Kong's rate limits as Envoy's rate limit service: fixed UTC windows, refusals uncounted, Kong's headers.

Envoy's own limiter is a token bucket: it lets twice the limit pass in the first window and takes a token from
one window for a request that another refuses.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from plexus.xds.v1 import ratelimit_pb2
from services.gateway.plugins import WINDOWS_S, RateLimitingConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.gateway.kong import Kong

SERVICE = "envoy.service.ratelimit.v3.RateLimitService"
MAX_IDENTITIES = 100_000
"""Counters kept at once; beyond it the one unused for longest starts anew."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request passes, and the headers of its answer."""

    allowed: bool
    headers: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Window:
    started_s: int
    count: int


class Limiter:
    """The limits of one kong.yml and their counters; for one event loop, so a decision is atomic."""

    def __init__(
        self,
        kong: Kong,
        *,
        now: Callable[[], float] = time.time,
        max_identities: int = MAX_IDENTITIES,
    ) -> None:
        """Start with empty counters.

        Args:
            kong: The file whose rate-limiting plugins count.
            now: Seconds since the epoch.
            max_identities: Bound of the counters kept.
        """
        self._limits = dict(kong.limits())
        self._now = now
        self._max_identities = max_identities
        self._counters: OrderedDict[tuple[str, str], dict[str, _Window]] = OrderedDict()

    def reconfigure(self, kong: Kong) -> None:
        """Take the limits of a changed file; counters stay, as they do over Kong's reload."""
        self._limits = dict(kong.limits())

    def decide(self, facts: Mapping[str, str]) -> Decision:
        """Count one request, or refuse it.

        Args:
            facts: What the route's descriptor says: scope, service, consumer, credential, remote_address.
        """
        scope = facts.get("scope", "")
        own = f"consumer:{facts.get('consumer', '')}"
        if own in self._limits:  # one counter over all routes, and stronger than the route's limit
            scope = own
        config = self._limits.get(scope)
        if config is None:
            return Decision(allowed=True, headers=())
        now = self._now()
        counters = self._windows((scope, _identity(config, facts)), config, now)
        limits = config.windows()
        allowed = all(counters[name].count < limit for name, limit in limits.items())
        if allowed:
            for counter in counters.values():
                counter.count += 1
        headers = () if config.hide_client_headers else _headers(limits, counters, now, allowed=allowed)
        return Decision(allowed, headers)

    def _windows(self, key: tuple[str, str], config: RateLimitingConfig, now: float) -> dict[str, _Window]:
        kept = self._counters.pop(key, {})
        current = {}
        for name in config.windows():
            started = int(now) - int(now) % WINDOWS_S[name]
            window = kept.get(name)
            current[name] = window if window and window.started_s == started else _Window(started, 0)
        self._counters[key] = current
        while len(self._counters) > self._max_identities:
            self._counters.popitem(last=False)
        return current


def _identity(config: RateLimitingConfig, facts: Mapping[str, str]) -> str:
    chosen = {"consumer": "consumer", "credential": "credential", "service": "service"}.get(config.limit_by)
    if chosen and facts.get(chosen):
        return f"{chosen}:{facts[chosen]}"
    return f"ip:{facts.get('remote_address', '')}"


def _headers(
    limits: Mapping[str, int], counters: Mapping[str, _Window], now: float, *, allowed: bool
) -> tuple[tuple[str, str], ...]:
    headers = []
    tightest = ""
    for name, limit in limits.items():
        remaining = max(0, limit - counters[name].count)
        headers.append((f"X-RateLimit-Limit-{name.capitalize()}", str(limit)))
        headers.append((f"X-RateLimit-Remaining-{name.capitalize()}", str(remaining)))
        # The window with the fewest left; of equals the longer one.
        if not tightest or remaining <= max(0, limits[tightest] - counters[tightest].count):
            tightest = name
    window = counters[tightest]
    reset = max(1, int(window.started_s + WINDOWS_S[tightest] - int(now)))
    headers += [
        ("RateLimit-Limit", str(limits[tightest])),
        ("RateLimit-Remaining", str(max(0, limits[tightest] - window.count))),
        ("RateLimit-Reset", str(reset)),
    ]
    if not allowed:
        headers.append(("Retry-After", str(reset)))
    return tuple(headers)


def add_to_server(limiter: Limiter, server: grpc.aio.Server) -> None:
    """Serve `limiter` under Envoy's official method path."""

    async def should_rate_limit(
        request: ratelimit_pb2.RateLimitRequest, _context: object
    ) -> ratelimit_pb2.RateLimitResponse:
        response = ratelimit_pb2.RateLimitResponse(overall_code=ratelimit_pb2.RateLimitResponse.CODE_OK)
        for descriptor in request.descriptors:
            decision = limiter.decide({entry.key: entry.value for entry in descriptor.entries})
            if not decision.allowed:
                response.overall_code = ratelimit_pb2.RateLimitResponse.CODE_OVER_LIMIT
            for key, value in decision.headers:
                response.response_headers_to_add.add(key=key, value=value)
        return response

    handler = grpc.unary_unary_rpc_method_handler(
        should_rate_limit,
        request_deserializer=ratelimit_pb2.RateLimitRequest.FromString,
        response_serializer=ratelimit_pb2.RateLimitResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(SERVICE, {"ShouldRateLimit": handler})
    server.add_generic_rpc_handlers((generic,))
