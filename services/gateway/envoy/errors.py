"""One shape for every refusal: google.rpc.Status as JSON, as the services' own errors arrive over REST."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from google.rpc import error_details_pb2, status_pb2

from services.gateway.envoy.types import Json, typed

_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
_REQUEST = "type.googleapis.com/google.rpc.RequestInfo"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the edge says with an HTTP status: google.rpc.Code, machine-readable reason, text."""

    status: int
    code: int
    reason: str
    message: str


REFUSALS = (
    Refusal(400, 3, "BAD_REQUEST", "Bad request"),
    Refusal(401, 16, "UNAUTHENTICATED", "Unauthorized"),
    Refusal(403, 7, "PERMISSION_DENIED", "You cannot consume this service"),
    Refusal(404, 5, "ROUTE_NOT_FOUND", "no Route matched with those values"),
    Refusal(405, 12, "METHOD_NOT_ALLOWED", "Method not allowed"),
    Refusal(408, 4, "REQUEST_TIMEOUT", "The request was not complete in time"),
    Refusal(411, 3, "LENGTH_REQUIRED", "A content length is required"),
    Refusal(413, 3, "REQUEST_TOO_LARGE", "Request size limit exceeded"),
    Refusal(414, 3, "URI_TOO_LONG", "URI too long"),
    Refusal(415, 3, "UNSUPPORTED_MEDIA_TYPE", "The content type is not supported here"),
    Refusal(426, 9, "UPGRADE_REQUIRED", "Another protocol is required"),
    Refusal(429, 8, "RATE_LIMIT_EXCEEDED", "API rate limit exceeded"),
    Refusal(431, 3, "HEADERS_TOO_LARGE", "Request header or cookie too large"),
    Refusal(501, 12, "NOT_IMPLEMENTED", "Not implemented"),
    Refusal(502, 14, "BAD_GATEWAY", "An invalid response was received from the service"),
    Refusal(503, 14, "SERVICE_UNAVAILABLE", "The service is not available"),
    Refusal(504, 4, "GATEWAY_TIMEOUT", "The service did not answer in time"),
)
"""Texts follow Kong's. Envoy's own words for 5xx are not shown: they name hosts."""
BAD_CREDENTIAL = 'Bearer error="invalid_token"'
"""Challenge after a token that is not accepted."""
OTHERWISE = Refusal(500, 13, "INTERNAL", "An unexpected error occurred")


def local_replies() -> Json:
    """LocalReplyConfig: every answer that Envoy itself makes."""
    # The transcoder turns a REST request into a gRPC one and keeps the first path in this header.
    rest = {"name": "x-envoy-original-path", "present_match": True, "invert_match": True}
    native = [_header("content-type", {"prefix": "application/grpc"}), {"header_filter": {"header": rest}}]
    mappers: list[Json] = []
    for refusal in (*REFUSALS, OTHERWISE):
        exact = refusal is not OTHERWISE
        status = _status(refusal.status if exact else 400, "EQ" if exact else "GE")
        # A gRPC client reads the body as grpc-message: plain text there.
        mappers.append(
            {
                "filter": {"and_filter": {"filters": [status, *native]}},
                "body_format_override": {"text_format_source": {"inline_string": refusal.message}},
                "headers_to_add": _grpc_status(refusal),
            }
        )
        if refusal.status == 400:  # noqa: PLR2004 - the parser's message tells the caller what is wrong with the JSON
            parse_error = _cel("response.code_details.contains('grpc_json_transcode_failure')")
            mappers.append(
                {
                    "filter": {"and_filter": {"filters": [status, parse_error]}},
                    "body_format_override": _body(refusal, message="%LOCAL_REPLY_BODY%"),
                }
            )
        if refusal.status == 401:  # noqa: PLR2004 - the challenge tells a missing token from a bad one
            bad_token = {"header_filter": {"header": {"name": "authorization", "present_match": True}}}
            mappers.append(
                {
                    "filter": {"and_filter": {"filters": [status, bad_token]}},
                    "body_format_override": _body(refusal),
                    # Over jwt_authn's own, which repeats the URL.
                    "headers_to_add": [_set("www-authenticate", BAD_CREDENTIAL)],
                }
            )
        mapper: Json = {"filter": status, "body_format_override": _body(refusal)}
        if refusal.status == 401:  # noqa: PLR2004 - as above
            mapper["headers_to_add"] = [_set("www-authenticate", "Bearer", action="ADD_IF_ABSENT")]
        mappers.append(mapper)
    return {"mappers": mappers}


def _grpc_status(refusal: Refusal) -> list[Json]:
    """Code and details for gRPC's own clients, over Envoy's code for the HTTP status."""
    # To them an unknown path is a method that is not there.
    code = 12 if refusal.status == 404 else refusal.code  # noqa: PLR2004 - UNIMPLEMENTED
    status = status_pb2.Status(code=code, message=refusal.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=refusal.reason, domain="plexus"))
    details = base64.b64encode(status.SerializeToString()).decode().rstrip("=")
    return [_set("grpc-status", str(code)), _set("grpc-status-details-bin", details)]


def _body(refusal: Refusal, message: str | None = None) -> Json:
    return {
        "content_type": "application/json",
        "json_format": {
            "code": refusal.code,
            "message": message or refusal.message,
            "details": [
                {"@type": _INFO, "reason": refusal.reason, "domain": "plexus"},
                {"@type": _REQUEST, "requestId": "%REQ(X-REQUEST-ID)%"},
            ],
        },
    }


def _status(status: int, operator: str) -> Json:
    value = {"default_value": status, "runtime_key": f"edge.status_{status}"}
    return {"status_code_filter": {"comparison": {"op": operator, "value": value}}}


def _header(name: str, matcher: Json) -> Json:
    return {"header_filter": {"header": {"name": name, "string_match": matcher}}}


def _cel(expression: str) -> Json:
    return {
        "extension_filter": {
            "name": "cel",
            "typed_config": typed(
                "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=expression
            ),
        }
    }


def _set(name: str, value: str, *, action: str = "OVERWRITE_IF_EXISTS_OR_ADD") -> Json:
    return {"header": {"key": name, "value": value}, "append_action": action}
