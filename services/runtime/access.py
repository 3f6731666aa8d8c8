"""Who may call a method: mesh identities by intentions, end users by the groups named in the proto."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import structlog
from google.protobuf import descriptor_pool

from plexus.options.v1 import options_pb2
from services.runtime.errors import PermissionDeniedError, UnauthenticatedError

if TYPE_CHECKING:
    from services.runtime.request import Request

audit = structlog.get_logger("audit")
"""Who was refused what, and by which rule."""

EDGE = "edge"
"""Only this peer's word about the end user is believed."""
SPIFFE_PREFIX = "spiffe://"
_OWN_CALLS = (
    "/grpc.health.v1.Health/",
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/",
)
"""What the edge calls for itself, with no end user behind it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one call and the rule it came from, for the audit log."""

    allowed: bool
    rule: str


class Authorizer(Protocol):
    """Decides which services may call which methods."""

    def decide(self, source: str, path: str) -> Decision:
        """Tell whether `source` (a service name) may call `path` (`/package.Service/Method`), and why."""
        ...


class AllowAll:
    """No intentions: for tests of one service alone."""

    def decide(self, source: str, path: str) -> Decision:
        """Allow."""
        del source, path
        return Decision(allowed=True, rule="allow all")


def service_name(spiffe_id: str) -> str:
    """The service of `spiffe://<trust domain>/ns/<ns>/dc/<dc>/svc/<service>`, else an empty string."""
    head, _, name = spiffe_id.rpartition("/svc/")
    return name if head.startswith(SPIFFE_PREFIX) and "/" not in name else ""


@lru_cache(maxsize=1024)
def access_of(path: str) -> options_pb2.Access:
    """The access option of `/package.Service/Method`; the default rule if the method has none."""
    service, _, method = path.removeprefix("/").rpartition("/")
    try:
        descriptor = descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
    except KeyError:
        return options_pb2.Access()
    return descriptor.GetOptions().Extensions[options_pb2.access]


def check(request: Request, path: str, authorizer: Authorizer, access: options_pb2.Access) -> None:
    """Apply both rules to a call.

    Args:
        request: Who calls.
        path: Of the method.
        authorizer: The intentions.
        access: What the method says of end users.

    Raises:
        UnauthenticatedError: No mesh identity, or an end user's call without a consumer.
        PermissionDeniedError: No intention allows it, or the consumer has none of the groups.
    """
    if not request.peer:
        raise UnauthenticatedError("the caller presented no mesh identity", reason="NO_IDENTITY")
    decision = authorizer.decide(request.peer, path)
    if not decision.allowed:
        audit.warning(
            "call_denied",
            source=request.peer,
            source_id=request.peer_id,
            method=path,
            rule=decision.rule,
            consumer=request.consumer or None,
        )
        raise PermissionDeniedError(
            f"no intention allows {request.peer} to call {path}",
            reason="INTENTION_DENIED",
            metadata={"source": request.peer, "method": path},
        )
    if request.peer != EDGE or path.startswith(_OWN_CALLS):
        return
    if access.anonymous:
        return
    if not request.consumer:
        raise UnauthenticatedError("this method needs an authenticated consumer", reason="NO_CONSUMER")
    if access.groups and request.groups.isdisjoint(access.groups):
        raise PermissionDeniedError(
            f"{request.consumer} is in none of the groups that may call this: {', '.join(access.groups)}",
            reason="GROUP_REQUIRED",
            metadata={"groups": ",".join(access.groups)},
        )
