"""What Envoy starts from: clusters, control plane, identity, admin."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.gateway.envoy.listener import CERTIFICATE, listener, tls_certificate
from services.gateway.envoy.routes import route_config
from services.gateway.envoy.split import by_subset
from services.gateway.envoy.types import CONTROL_CLUSTER, LIMITS_CLUSTER, Json, seconds, typed
from services.gateway.kong import EDGE_SERVICE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.gateway.envoy.types import Certificate, Edge
    from services.gateway.kong import Kong

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
CLUSTERS_FILE = "clusters.json"
LISTENERS_FILE = "listeners.json"
CERTIFICATE_FILE = "certificate.json"
ROUTES_FILE = "routes.json"
_SDS = "envoy.extensions.transport_sockets.tls.v3.Secret"
_MAX_CONNECTIONS = 4096
_MAX_REQUESTS = 16384


@dataclass(frozen=True, slots=True)
class Mesh:
    """How the edge finds services and proves who it is.

    Attributes:
        control_planes: Host and port of each; a host may be a name.
        identity_dir: Folder with ca.pem, cert.pem, key.pem; watched, so that a rotation is picked up.
        sds_dir: Folder for the two small files that name them.
        spiffe_prefix: What stands before `/svc/<name>` in every identity of the mesh.
    """

    control_planes: tuple[tuple[str, int], ...]
    identity_dir: Path
    sds_dir: Path
    spiffe_prefix: str


@dataclass(frozen=True, slots=True)
class Fixed:
    """Plaintext addresses instead of a mesh, for tests of the edge alone."""

    addresses: Mapping[str, tuple[str, int]]


def mesh_services(kong: Kong) -> dict[str, int]:
    """The mesh services that kong.yml leads to, each with its shortest connect timeout in milliseconds."""
    found: dict[str, int] = {}
    for service in kong.services:
        if service.name != EDGE_SERVICE:
            name = service.mesh_service
            found[name] = min(service.connect_timeout, found.get(name, service.connect_timeout))
    return found


def bootstrap(
    edge: Edge, upstreams: Mesh | Fixed, *, admin_socket: Path, xds_dir: Path, node_id: str
) -> Json:
    """The bootstrap file; clusters and listener are in `xds_dir`, replaceable while it runs."""
    clusters = [_pipe_cluster(LIMITS_CLUSTER, edge.limits_socket)]
    dynamic: Json = {
        "cds_config": _from_file(xds_dir, CLUSTERS_FILE),
        "lds_config": _from_file(xds_dir, LISTENERS_FILE),
    }
    if isinstance(upstreams, Mesh):
        clusters.append(_control_cluster(upstreams))
        dynamic["ads_config"] = {
            "api_type": "GRPC",
            "transport_api_version": "V3",
            "set_node_on_first_message_only": True,
            "grpc_services": [{"envoy_grpc": {"cluster_name": CONTROL_CLUSTER}}],
        }
    return {
        "node": {"id": node_id, "cluster": "edge"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "dynamic_resources": dynamic,
        "static_resources": {"clusters": clusters},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": typed(
                        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        max_active_downstream_connections=_MAX_CONNECTIONS,
                    ),
                }
            ]
        },
    }


def clusters(edge: Edge, upstreams: Mesh | Fixed) -> list[Json]:
    """The Cluster resources, one per mesh service of kong.yml."""
    return [
        typed("envoy.config.cluster.v3.Cluster", **_cluster(name, timeout_ms, upstreams))
        for name, timeout_ms in sorted(mesh_services(edge.kong).items())
    ]


def _from_file(xds_dir: Path, name: str) -> Json:
    source = {"path": str(xds_dir / name), "watched_directory": {"path": str(xds_dir)}}
    return {"path_config_source": source, "resource_api_version": "V3"}


def xds_files(edge: Edge, upstreams: Mesh | Fixed, xds_dir: Path) -> dict[str, Json]:
    """Content of the files in `xds_dir`, in the order in which to write them; the version is their hash."""
    apart = (_from_file(xds_dir, name) for name in (ROUTES_FILE, CERTIFICATE_FILE))
    files = {
        CLUSTERS_FILE: clusters(edge, upstreams),
        # Apart from the listener: connections outlive a change of the routes, or of the certificate.
        ROUTES_FILE: [typed("envoy.config.route.v3.RouteConfiguration", **route_config(edge))],
        CERTIFICATE_FILE: [] if edge.certificate is None else [_public(edge.certificate)],
        LISTENERS_FILE: [listener(edge, *apart)],
    }
    return {
        name: {"version_info": _digest(resources), "resources": resources}
        for name, resources in files.items()
    }


def _public(certificate: Certificate) -> Json:
    return typed(_SDS, name=CERTIFICATE, tls_certificate=tls_certificate(certificate))


def self_contained(config: Json, edge: Edge, upstreams: Mesh | Fixed) -> Json:
    """The bootstrap with all resources inside, which `envoy --mode validate` checks whole."""
    inside = ("cds_config", "lds_config")
    dynamic = {key: value for key, value in config["dynamic_resources"].items() if key not in inside}
    static = {
        "clusters": [
            *config["static_resources"]["clusters"],
            *map(_untyped, clusters(edge, upstreams)),
        ],
        "listeners": [_untyped(listener(edge))],
    }
    return {**config, "dynamic_resources": dynamic, "static_resources": static}


def _digest(resources: list[Json]) -> str:
    return hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]


def sds_files(mesh: Mesh) -> dict[Path, Json]:
    """Secrets by file reference: the edge's own certificate, and the roots it believes."""
    watched = {"path": str(mesh.identity_dir)}
    identity = {
        "certificate_chain": {"filename": str(mesh.identity_dir / "cert.pem")},
        "private_key": {"filename": str(mesh.identity_dir / "key.pem")},
        "watched_directory": watched,
    }
    roots = {"trusted_ca": {"filename": str(mesh.identity_dir / "ca.pem")}, "watched_directory": watched}
    return {
        mesh.sds_dir / "identity.json": _secret("identity", tls_certificate=identity),
        mesh.sds_dir / "roots.json": _secret("roots", validation_context=roots),
    }


def _untyped(message: Json) -> Json:
    return {key: value for key, value in message.items() if key != "@type"}


def _secret(name: str, **content: Json) -> Json:
    return {"resources": [typed(_SDS, name=name, **content)]}


def _http2() -> Json:
    # No PING keepalive: gRPC servers answer frequent ones with GOAWAY too_many_pings. The connection's end of
    # life makes a rotated certificate count.
    options = typed(
        _HTTP_OPTIONS,
        explicit_http_config={
            "http2_protocol_options": {
                "initial_stream_window_size": 1 << 20,
                "initial_connection_window_size": 8 << 20,
            }
        },
        common_http_protocol_options={"max_connection_duration": "3600s"},
    )
    return {_HTTP_OPTIONS: options}


def _cluster(name: str, connect_timeout_ms: int, upstreams: Mesh | Fixed) -> Json:
    cluster: Json = {
        "name": name,
        "connect_timeout": seconds(connect_timeout_ms),
        "typed_extension_protocol_options": _http2(),
        # The services have admission limits of their own; Envoy's default of 1024 would cut event streams.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _MAX_CONNECTIONS,
                    "max_pending_requests": _MAX_REQUESTS,
                    "max_requests": _MAX_REQUESTS,
                    "max_retries": 64,
                }
            ]
        },
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 30, "keepalive_interval": 10}},
    }
    if isinstance(upstreams, Fixed):
        host, port = upstreams.addresses.get(name, ("127.0.0.1", 1))
        return {**cluster, "type": "STATIC", "load_assignment": _assignment(name, _socket(host, port))}
    return {
        **cluster,
        **by_subset(),
        "type": "EDS",
        "eds_cluster_config": {
            "service_name": name,
            "eds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "1s"},
        },
        "transport_socket": _mtls(upstreams, name),
    }


def _control_cluster(mesh: Mesh) -> Json:
    return {
        "name": CONTROL_CLUSTER,
        "type": "STRICT_DNS",  # an address needs no look-up
        "dns_lookup_family": "V4_PREFERRED",
        "connect_timeout": "2s",
        "load_assignment": _assignment(CONTROL_CLUSTER, *(_socket(*each) for each in mesh.control_planes)),
        "typed_extension_protocol_options": _http2(),
        "transport_socket": _mtls(mesh, "control"),
    }


def _pipe_cluster(name: str, socket: Path) -> Json:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": _assignment(name, {"pipe": {"path": str(socket)}}),
        "typed_extension_protocol_options": _http2(),
    }


def _socket(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _assignment(name: str, *addresses: Json) -> Json:
    endpoints = [{"endpoint": {"address": address}} for address in addresses]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def _mtls(mesh: Mesh, service: str) -> Json:
    def secret(name: str) -> Json:
        source = {
            "path_config_source": {"path": str(mesh.sds_dir / f"{name}.json")},
            "resource_api_version": "V3",
        }
        return {"name": name, "sds_config": source}

    identity = f"{mesh.spiffe_prefix}/svc/{service}"
    san = {"san_type": "URI", "matcher": {"exact": identity}}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed(
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            common_tls_context={
                "alpn_protocols": ["h2"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "tls_certificate_sds_secret_configs": [secret("identity")],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": [san]},
                    "validation_context_sds_secret_config": secret("roots"),
                },
            },
        ),
    }
