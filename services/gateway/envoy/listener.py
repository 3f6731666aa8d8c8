"""The public listener: one filter chain for REST, SSE, raw bodies and native gRPC."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from services.gateway.envoy import errors, lua, routes
from services.gateway.envoy.types import FILTERS, LIMITS_CLUSTER, Json, typed
from services.runtime.addresses import is_loopback

if TYPE_CHECKING:
    from services.gateway.envoy.types import Certificate, Edge

CERTIFICATE = "public"
"""Name of the secret with the public certificate."""
_FILTER_STATE = "edge.jwt"
_MAX_JSON_BYTES = 64 << 20
"""Largest body that is held to be transcoded; raw bodies and streams pass unheld."""
_MAX_HEADERS_KB = 32
_HANDSHAKE = "10s"
"""How long a client may take to agree on TLS."""
_CLIENT_IDENTITY = (
    "x-consumer-",
    "x-credential-",
    "x-anonymous-consumer",
    "x-authenticated-",
    "x-envoy-",
    "x-jwt-hint",
)
"""Header families that only the edge may set."""


def listener(edge: Edge, routes_from: Json | None = None, certificate_from: Json | None = None) -> Json:
    """The Listener resource.

    Args:
        edge: What it is rendered from.
        routes_from: ConfigSource of the routes; default: they are inside.
        certificate_from: ConfigSource of the public certificate; default: it is inside.

    Raises:
        ValueError: Neither TLS nor a loopback address; tokens would cross a network in the clear.
    """
    if edge.certificate is None and not is_loopback(edge.host):
        raise ValueError(f"the edge listens on {edge.host} without TLS: only a loopback address is allowed")
    manager = typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="edge",
        codec_type="AUTO",
        server_name="plexus",
        use_remote_address=True,
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action="KEEP_UNCHANGED",
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=edge.kong.echoes_request_id(),
        max_request_headers_kb=_MAX_HEADERS_KB,
        request_headers_timeout="10s",
        stream_idle_timeout="300s",
        common_http_protocol_options={"max_headers_count": 100, "idle_timeout": "3600s"},
        http_protocol_options={"enable_trailers": True},
        http2_protocol_options={
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": 1 << 20,
            "initial_connection_window_size": 8 << 20,
        },
        local_reply_config=errors.local_replies(),
        **_routes(edge, routes_from),
        http_filters=_filters(edge),
    )
    return typed(
        "envoy.config.listener.v3.Listener",
        name="edge",
        address={"socket_address": {"address": edge.host, "port_value": edge.port}},
        per_connection_buffer_limit_bytes=1 << 20,
        filter_chains=[
            {
                "filters": [
                    {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                ],
                **_tls(edge, certificate_from),
            }
        ],
    )


def tls_certificate(certificate: Certificate) -> Json:
    """A TlsCertificate; Envoy refuses a key that does not fit."""
    return {
        "certificate_chain": {"inline_string": certificate.chain},
        "private_key": {"inline_string": certificate.key},
    }


def _tls(edge: Edge, certificate_from: Json | None) -> Json:
    if edge.certificate is None:
        return {}
    if certificate_from is None:
        certificate: Json = {"tls_certificates": [tls_certificate(edge.certificate)]}
    else:
        secret = {"name": CERTIFICATE, "sds_config": certificate_from}
        certificate = {"tls_certificate_sds_secret_configs": [secret]}
    context = typed(
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        common_tls_context={
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            **certificate,
        },
    )
    return {
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        "transport_socket_connect_timeout": _HANDSHAKE,
    }


def _routes(edge: Edge, routes_from: Json | None) -> Json:
    if routes_from is None:
        return {"route_config": routes.route_config(edge)}
    return {"rds": {"route_config_name": routes.ROUTES, "config_source": routes_from}}


def _filter(name: str, config: Json) -> Json:
    return {"name": name, "typed_config": config}


def _filters(edge: Edge) -> list[Json]:
    """In Kong's order: cors, jwt, size, acl, limits; then the translation to gRPC."""
    return [
        _filter("edge.strip", _strip()),
        _filter(routes.CORS, typed(f"{FILTERS}cors.v3.Cors")),
        _filter(routes.HINT, _lua(lua.hint(edge))),
        _filter("edge.jwt_key", _remember_hint()),
        _filter(lua.JWT_FILTER, jwt_authn(edge)),
        _filter(routes.CONSUMER, _lua(lua.consumer(edge))),
        _filter(routes.SIZE, typed(f"{FILTERS}filter_chain.v3.FilterChainConfig")),
        _filter(routes.RBAC, typed(f"{FILTERS}rbac.v3.RBAC")),
        _filter(routes.RATELIMIT, _ratelimit()),
        _filter(routes.REST, typed(f"{FILTERS}header_mutation.v3.HeaderMutation", mutations={})),
        _filter(routes.ANSWER, _lua(lua.http_answer())),
        _filter(routes.TRANSCODER, transcoder(edge)),
        _filter(
            "envoy.filters.http.router", typed(f"{FILTERS}router.v3.Router", suppress_envoy_headers=True)
        ),
    ]


def _strip() -> Json:
    removals = [{"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in _CLIENT_IDENTITY]
    return typed(f"{FILTERS}header_mutation.v3.HeaderMutation", mutations={"request_mutations": removals})


def _lua(code: str) -> Json:
    return typed(f"{FILTERS}lua.v3.Lua", default_source_code={"inline_string": code})


def _remember_hint() -> Json:
    value = {"text_format_source": {"inline_string": f"%REQ({lua.HINT_HEADER})%"}}
    entry = {
        "object_key": _FILTER_STATE,
        "factory_key": "envoy.string",
        "format_string": {**value, "omit_empty_values": True},
        "skip_if_empty": True,
    }
    return typed(f"{FILTERS}set_filter_state.v3.Config", on_request_headers=[entry])


def jwt_authn(edge: Edge) -> Json:
    """One provider a credential, chosen by the hint: the cost of a token does not grow with the consumers."""
    providers: Json = {}
    requires: Json = {}
    listed = (credential for entries in edge.credentials.values() for credential in entries)
    for number, credential in enumerate(sorted(listed, key=lambda entry: entry.key)):
        name = f"credential-{number}"
        jwks = {"keys": [credential.jwk()]}
        providers[name] = {
            "issuer": credential.key,
            "local_jwks": {"inline_string": json.dumps(jwks, separators=(",", ":"), sort_keys=True)},
            "forward": False,
            "from_headers": [{"name": "Authorization", "value_prefix": "Bearer "}],
            "payload_in_metadata": "payload",
            "require_expiration": True,
            "clock_skew_seconds": 1,
        }
        requires[credential.key] = {"provider_name": name}
    # A hint that is missing here would mean no check at all: the consumer filter refuses such a request.
    rules = {"name": _FILTER_STATE, "requires": requires}
    return typed(f"{FILTERS}jwt_authn.v3.JwtAuthentication", providers=providers, filter_state_rules=rules)


def _ratelimit() -> Json:
    return typed(
        f"{FILTERS}ratelimit.v3.RateLimit",
        domain="edge",
        timeout="0.250s",
        # Kong's fault_tolerant: requests pass while the counter is away.
        failure_mode_deny=False,
        rate_limited_as_resource_exhausted=True,
        disable_x_envoy_ratelimited_header=True,
        rate_limit_service={
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": LIMITS_CLUSTER}},
        },
    )


def transcoder(edge: Edge) -> Json:
    """JSON to gRPC by the protos' annotations; typed server streams as server-sent events."""
    return typed(
        f"{FILTERS}grpc_json_transcoder.v3.GrpcJsonTranscoder",
        proto_descriptor_bin=base64.b64encode(edge.descriptors).decode(),
        services=list(edge.proto_services),
        print_options={"always_print_primitive_fields": True, "stream_sse_style_delimited": True},
        convert_grpc_status=True,
        match_incoming_request_route=True,
        request_validation_options={
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,  # else the body would overrule the path
        },
        max_request_body_size=_MAX_JSON_BYTES,
        max_response_body_size=_MAX_JSON_BYTES,
    )
