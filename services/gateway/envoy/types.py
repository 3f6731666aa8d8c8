"""Envoy's configuration as JSON, with its type names spelled in one way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.gateway.credentials import Credential
    from services.gateway.kong import Kong
    from services.gateway.traffic import Way

Json = dict[str, Any]

FILTERS = "envoy.extensions.filters.http."
CONTROL_CLUSTER = "edge.control"
LIMITS_CLUSTER = "edge.limits"


def typed(name: str, /, **fields: Any) -> Json:
    """A message in an Any: its type and fields."""
    return {"@type": f"type.googleapis.com/{name}", **fields}


def seconds(milliseconds: int) -> str:
    """A Duration in JSON."""
    return f"{milliseconds / 1000:.3f}s"


@dataclass(frozen=True, slots=True)
class Pages:
    """What the edge serves itself: files, and the policy of the page's own script."""

    docs: Path
    openapi: Path
    docs_script_sha256: str
    """Base64, for the Content-Security-Policy."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The public certificate: PEM texts."""

    chain: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Edge:
    """Everything an edge is rendered from.

    Attributes:
        kong: The routes, consumers and plugins.
        credentials: Keys of each consumer.
        descriptors: Serialized FileDescriptorSet of the services, with google.rpc's error details.
        proto_services: Full names of the proto services that are transcoded.
        host: Address to listen on; loopback, if there is no certificate.
        port: Port to listen on.
        limits_socket: Unix socket of the rate limit service.
        pages: Files of the edge's own pages.
        bindings: The REST requests of each gRPC method, as `envoy.bindings` gives them.
        ways: Of each mesh service, where its calls go by the traffic policies.
        certificate: With it clients must use TLS.
    """

    kong: Kong
    credentials: Mapping[str, tuple[Credential, ...]]
    descriptors: bytes
    proto_services: tuple[str, ...]
    host: str
    port: int
    limits_socket: Path
    pages: Pages
    bindings: Mapping[str, list[tuple[str, str]]] = field(default_factory=dict)
    ways: Mapping[str, tuple[Way, ...]] = field(default_factory=dict)
    certificate: Certificate | None = None
