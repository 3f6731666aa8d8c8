"""The call in progress: who calls, on whose behalf, until when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from plexus.client.propagation import CallContext, call_context

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Rest:
    """The HTTP request that the edge turned into a call.

    Attributes:
        method: Such as `GET`.
        headers: As the client sent them, names in lower case.
    """

    method: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Request(CallContext):
    """Facts of the call being handled, beyond what is handed on to further calls.

    Attributes:
        peer: Service name from the caller's SPIFFE id; empty if it presented none.
        peer_id: The whole SPIFFE id.
        consumer: End user or application, as verified by the edge; empty for calls from within the mesh.
        groups: The consumer's groups.
        rest: The HTTP request behind the call; None for gRPC.
        traced: Whether somebody follows the trace: the caller brought it, or spans are recorded here.
    """

    peer: str = ""
    peer_id: str = ""
    consumer: str = ""
    groups: frozenset[str] = frozenset()
    rest: Rest | None = None
    traced: bool = False


def current() -> Request:
    """The call in progress; outside a call an empty Request, with no peer and no deadline."""
    return cast("Request | None", call_context.get()) or Request()
