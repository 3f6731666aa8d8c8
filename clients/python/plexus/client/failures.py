"""What a failed call says beyond its status code (google.rpc.Status, google.aip.dev/193)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries the google.rpc.Status of an error."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request that is wrong: its path as in the proto (`points[3].vector`) and why."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything a failed call tells.

    Attributes:
        code: gRPC status code.
        message: One sentence for people.
        reason: UPPER_SNAKE constant for programs; empty if the error was not made by a service (a deadline
            that ran out in the client, a connection that broke).
        domain: Who defines the reason: `plexus`.
        metadata: Facts for programs, such as the resource's name.
        violations: Fields that are wrong.
        retry_after_s: When to try again, in seconds; None if the server does not say.
        request_id: Id that is in the logs of every service that the request passed; empty if unknown.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None
    request_id: str = ""


def problem(error: grpc.RpcError) -> Problem:
    """Read a failed call's details; works for errors of grpc and of grpc.aio."""
    call = cast("Any", error)  # grpc.RpcError declares nothing; what calls raise is a grpc.Call as well
    code: grpc.StatusCode = call.code() or grpc.StatusCode.UNKNOWN
    known: dict[str, Any] = {}
    for detail in _details(call):
        known |= _read(detail)
    return Problem(code, call.details() or code.name, **known)


def _details(call: Any) -> list[AnyMessage]:
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:  # a proxy's, not ours: the status code still counts
                return []
    return []


def _read(detail: AnyMessage) -> dict[str, Any]:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    if detail.Unpack(info):
        return {"reason": info.reason, "domain": info.domain, "metadata": dict(info.metadata)}
    if detail.Unpack(bad):
        found = tuple(Violation(each.field, each.description) for each in bad.field_violations)
        return {"violations": found}
    if detail.Unpack(retry):
        return {"retry_after_s": retry.retry_delay.ToMilliseconds() / 1000}
    if detail.Unpack(request):
        return {"request_id": request.request_id}
    return {}
