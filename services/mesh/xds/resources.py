"""What a resource is: names, types, and bytes that are made once and shared by all clients."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from google.protobuf import any_pb2, duration_pb2, wrappers_pb2

from plexus.xds.v1 import xds_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from google.protobuf.message import Message

T = "type.googleapis.com/"
LISTENER = T + "envoy.config.listener.v3.Listener"
ROUTE = T + "envoy.config.route.v3.RouteConfiguration"
CLUSTER = T + "envoy.config.cluster.v3.Cluster"
ENDPOINT = T + "envoy.config.endpoint.v3.ClusterLoadAssignment"

PUSH_ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
"""Make before break: what is referred to goes before what refers to it."""

SUBSET_MARK = "~"
"""Between a service and its subset in the name of a cluster; neither can have it in its own."""

Key = tuple[str, str]
"""Type URL and name of a resource."""


@dataclass(frozen=True, slots=True)
class Body:
    """One form of a resource.

    Attributes:
        any: The packed message.
        version: Digest of it.
        frame: It as an element of DiscoveryResponse.resources, encoded; a response is a row of these.
    """

    any: any_pb2.Any
    version: str
    frame: bytes

    @classmethod
    def of(cls, type_url: str, message: Message) -> Body:
        """Pack a message."""
        packed = pack(type_url, message)
        frame = xds_pb2.DiscoveryResponse(resources=[packed]).SerializeToString()
        return cls(packed, hashlib.sha256(packed.value).hexdigest()[:12], frame)


class Library(StrEnum):
    """A library of gRPC that must be sent something else; the value is how its clients begin their name."""

    CORE = "gRPC C-core"
    """Below Python, C++, Ruby and PHP."""
    JAVA = "gRPC Java"

    @classmethod
    def of(cls, user_agent: str) -> Library | None:
        """The library of a client; None for one that needs nothing of its own."""
        return next((library for library in cls if user_agent.startswith(library)), None)


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource: the same for all clients, or another for some.

    Attributes:
        body: What clients get.
        by_zone: What clients of these zones get instead.
        by_library: What clients on these libraries get instead.
    """

    body: Body
    by_zone: Mapping[str, Body] = field(default_factory=dict)
    by_library: Mapping[Library, Body] = field(default_factory=dict)

    def seen_from(self, zone: str = "", library: Library | None = None) -> Body:
        """The form for a client.

        Args:
            zone: Where it runs.
            library: What it runs on, if that matters.
        """
        if library is not None and library in self.by_library:
            return self.by_library[library]
        return self.by_zone.get(zone, self.body)

    def same_as(self, other: Resource | None) -> bool:
        """Whether no client could tell the two apart."""
        return other is not None and _frames(self) == _frames(other)


def _frames(resource: Resource) -> list[tuple[str, bytes]]:
    forms = (*sorted(resource.by_zone.items()), *sorted(resource.by_library.items()))
    return [("", resource.body.frame), *((name, body.frame) for name, body in forms)]


def pack(type_url: str, message: Message) -> any_pb2.Any:
    """Put a message of ours under an official type URL."""
    # Deterministic, so that equal resources have equal versions.
    return any_pb2.Any(type_url=type_url, value=message.SerializeToString(deterministic=True))


def number(value: int) -> wrappers_pb2.UInt32Value:
    """A number that can be absent."""
    return wrappers_pb2.UInt32Value(value=value)


def duration(value: timedelta) -> duration_pb2.Duration:
    """A length of time."""
    message = duration_pb2.Duration()
    message.FromTimedelta(value)
    return message


def ads() -> xds_pb2.ConfigSource:
    """Ask for it on the same stream."""
    return xds_pb2.ConfigSource(ads=xds_pb2.AggregatedConfigSource())


def route_name(service: str) -> str:
    """Name of a service's route configuration."""
    return f"{service}-route"


def subset_cluster(service: str, subset: str) -> str:
    """Name of a subset's cluster."""
    return f"{service}{SUBSET_MARK}{subset}"


def service_of(type_url: str, name: str) -> str:
    """The service that a resource belongs to."""
    if type_url == ROUTE:
        return name.removesuffix("-route")
    return name.partition(SUBSET_MARK)[0]
