"""Kong's routes and their plugins as one Envoy virtual host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from services.gateway import kong, plugins
from services.gateway.envoy import lua
from services.gateway.envoy.split import split
from services.gateway.envoy.types import FILTERS, Json, seconds, typed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.gateway.envoy.types import Edge, Pages

CORS = "envoy.filters.http.cors"
HINT = "edge.jwt_hint"
CONSUMER = "edge.consumer"
RBAC = "envoy.filters.http.rbac"
SIZE = "edge.size"
RATELIMIT = "envoy.filters.http.ratelimit"
REST = "edge.rest"
ANSWER = "edge.http_answer"
TRANSCODER = "envoy.filters.http.grpc_json_transcoder"
GUARDS = (HINT, lua.JWT_FILTER, CONSUMER)
"""Filters that ask for a token; a route without the jwt plugin turns them off."""
_GRPC_RESPONSE_HEADERS = (
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
    "grpc-accept-encoding",
    "grpc-encoding",
)
_LITERAL_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]+)?")
_MAX_PAGE_BYTES = 16 << 20


ROUTES = "kong"
"""Name of the route configuration."""


def route_config(edge: Edge) -> Json:
    """RouteConfiguration: every kong.yml route, then 404."""
    routes = [route for effective in edge.kong.routes() for route in _routes(edge, effective)]
    routes.append(
        {
            "name": "no-route",
            "match": {"prefix": "/"},
            "direct_response": {"status": 404},
            "typed_per_filter_config": {name: _disabled() for name in GUARDS},
        }
    )
    return {
        "name": ROUTES,
        "max_direct_response_body_size_bytes": _MAX_PAGE_BYTES,
        "virtual_hosts": [{"name": "kong", "domains": ["*"], "routes": routes}],
    }


def _routes(edge: Edge, effective: kong.EffectiveRoute) -> Iterator[Json]:
    for path in effective.route.paths:
        match = _match(path, effective.route)
        per_filter = dict(_per_filter(effective))
        if effective.service.name == kong.EDGE_SERVICE:
            match["headers"] = [_methods(["GET", "HEAD"])]
            per_filter[TRANSCODER] = _disabled()  # it knows no such path
            yield {
                "name": effective.route.name,
                "match": match,
                "typed_per_filter_config": per_filter,
                **_page(effective.route.name, edge.pages),
            }
            continue
        action: Json = {
            "cluster": effective.service.mesh_service,
            # Calls may stream for hours: the bound is on silence, as Kong's read_timeout is.
            "timeout": "0s",
            "idle_timeout": seconds(effective.service.read_timeout),
        }
        if effective.service.retries:
            action["retry_policy"] = {
                "retry_on": "connect-failure,refused-stream",
                "num_retries": effective.service.retries,
                "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.250s"},
            }
        route = {
            "name": effective.route.name,
            "match": match,
            "route": action,
            "typed_per_filter_config": per_filter,
        }
        yield from split(route, edge, effective.service.mesh_service, grpc=effective.route.is_grpc)


def _match(path: str, route: kong.Route) -> Json:
    # Kong anchors a regular expression at the start alone; Envoy matches the whole path.
    match: Json = {"safe_regex": {"regex": f"(?:{path[1:]}).*"}} if path.startswith("~") else {"prefix": path}
    if route.methods:
        match["headers"] = [_methods(list(route.methods))]
    if route.is_grpc:
        content_type = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
        match["headers"] = [*match.get("headers", []), content_type]
    return match


def _methods(methods: list[str]) -> Json:
    return {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(methods)}}}


def _page(name: str, pages: Pages) -> Json:
    headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
    if name == "healthz":
        body: Json = {"inline_string": '{"status":"ok"}\n'}
        headers["content-type"] = "application/json"
    elif name == "openapi":
        body = {"filename": str(pages.openapi)}
        headers["content-type"] = "application/json"
    else:
        body = {"filename": str(pages.docs)}
        headers["content-type"] = "text/html; charset=utf-8"
        headers["content-security-policy"] = (
            f"default-src 'none'; script-src 'sha256-{pages.docs_script_sha256}'; style-src 'unsafe-inline'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
    return {
        "direct_response": {"status": 200, "body": body},
        "response_headers_to_add": [
            {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
            for key, value in headers.items()
        ],
    }


def _disabled() -> Json:
    return typed("envoy.config.route.v3.FilterConfig", disabled=True)


def _per_filter(effective: kong.EffectiveRoute) -> Iterator[tuple[str, Json]]:
    if effective.config(plugins.Jwt) is None:
        for name in GUARDS:
            yield name, _disabled()
    cors = effective.config(plugins.Cors)
    if cors is not None:
        yield CORS, _cors(cors.config)
    acl = effective.config(plugins.Acl)
    if acl is not None:
        yield RBAC, _acl(acl.config)
    size = effective.config(plugins.RequestSizeLimiting)
    if size is not None:
        yield SIZE, _size(size.config)
    limit = effective.plugins.get("rate-limiting")
    if limit is not None:
        yield RATELIMIT, _rate_limit(limit.scope, effective.service.name)
    if effective.route.is_grpc:
        yield ANSWER, _disabled()
    else:
        yield REST, _hide_grpc_headers()


def _cors(config: plugins.CorsConfig) -> Json:
    policy: Json = {
        "allow_origin_string_match": [_origin(origin) for origin in config.origins],
        "allow_methods": ", ".join(config.methods),
        "allow_headers": ", ".join(config.headers),
        "expose_headers": ", ".join(config.exposed_headers),
        "allow_credentials": config.credentials,
        # Kong answers a refused preflight too, without the one header that would allow it.
        "forward_not_matching_preflights": False,
    }
    if config.max_age is not None:
        policy["max_age"] = str(config.max_age)
    return typed(f"{FILTERS}cors.v3.CorsPolicy", **policy)


def _origin(origin: str) -> Json:
    if origin == "*":
        return {"safe_regex": {"regex": ".*"}}
    if _LITERAL_ORIGIN.fullmatch(origin):
        return {"exact": origin}
    return {"safe_regex": {"regex": origin}}


def _acl(config: plugins.AclConfig) -> Json:
    groups = config.allow or config.deny or []
    principals = [
        {
            "sourced_metadata": {
                "metadata_matcher": {
                    "filter": lua.METADATA,
                    "path": [{"key": "groups"}],
                    "value": {"string_match": {"contains": lua.marked(group)}},
                }
            }
        }
        for group in groups
    ]
    rules = {
        "action": "ALLOW" if config.allow else "DENY",
        "policies": {"acl": {"permissions": [{"any": True}], "principals": principals}},
    }
    return typed(f"{FILTERS}rbac.v3.RBACPerRoute", rbac={"rules": rules})


def _size(config: plugins.RequestSizeLimitingConfig) -> Json:
    limit = typed(f"{FILTERS}body_size_limit.v3.BodySizeLimit", max_request_bytes=config.limit_bytes())
    chain = {"filters": [{"name": "edge.body_size_limit", "typed_config": limit}]}
    return typed(f"{FILTERS}filter_chain.v3.FilterChainConfigPerRoute", filter_chain=chain)


def _rate_limit(scope: str, service: str) -> Json:
    def from_header(header: str, key: str) -> Json:
        return {"request_headers": {"header_name": header, "descriptor_key": key, "skip_if_absent": True}}

    actions: list[Json] = [
        {"generic_key": {"descriptor_key": "scope", "descriptor_value": scope}},
        {"generic_key": {"descriptor_key": "service", "descriptor_value": service}},
        from_header("x-consumer-username", "consumer"),
        from_header("x-credential-identifier", "credential"),
        {"remote_address": {}},
    ]
    return typed(f"{FILTERS}ratelimit.v3.RateLimitPerRoute", rate_limits=[{"actions": actions}])


def _hide_grpc_headers() -> Json:
    return typed(
        f"{FILTERS}header_mutation.v3.HeaderMutationPerRoute",
        mutations={"response_mutations": [{"remove": name} for name in _GRPC_RESPONSE_HEADERS]},
    )
