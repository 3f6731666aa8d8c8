"""The one table between domain errors and gRPC statuses (google.aip.dev/193), in both directions."""

from __future__ import annotations

import math

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from plexus.client.failures import DETAILS_KEY, problem
from services.runtime import errors

__all__ = ["CODES", "DETAILS_KEY", "DOMAIN", "code_of", "from_rpc_error", "to_status"]

DOMAIN = "plexus"
"""ErrorInfo.domain of every error made here."""

CODES: dict[type[errors.PlexusError], grpc.StatusCode] = {
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRangeError: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AbortedError: grpc.StatusCode.ABORTED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
}
HTTP_STATUS = {
    "CONDITION_FAILED": 412,
    "MESSAGE_TOO_LARGE": 413,
    "OBJECT_TOO_LARGE": 413,
    "RANGE_BEYOND_END": 416,
    "UNSUPPORTED_CONTENT_ENCODING": 415,
    "DISK_FULL": 507,
}
"""Reasons that HTTP names more exactly than the status that their gRPC code becomes."""
_MESSAGE = 2000
_VALUE = (1000, 200, 50)
_VIOLATIONS = 16
_STATUS = 4000
_CLASSES = {code: kind for kind, code in CODES.items()}


def code_of(error: errors.PlexusError) -> grpc.StatusCode:
    """The status code of a domain error; INTERNAL for the base class."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]  # google.rpc messages ship without stubs
    return packed


def _width(char: str) -> int:
    """Bytes of a character in the header `grpc-message`."""
    return 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())


def _short(text: str, most: int) -> str:
    """The text, or its beginning and its end if it is wider."""
    if sum(map(_width, text[: most + 1])) <= most:
        return text
    ends = []
    for part in (text, text[::-1]):
        left, count = most // 2, 0
        while count < len(part) and (left := left - _width(part[count])) >= 0:
            count += 1
        ends.append(part[:count])
    return f"{ends[0]}…{ends[1][::-1]}"


def to_status(error: errors.PlexusError, request_id: str = "") -> status_pb2.Status:
    """The google.rpc.Status of a domain error: ErrorInfo, BadRequest, RetryInfo, RequestInfo.

    It is small enough for every client: what callers sent may be quoted in it, and clients drop a call with
    8 KiB of metadata without looking at them. So long texts keep their ends, and of many wrong fields only
    the first are told.
    """
    for most in _VALUE:
        answer = _status(error, request_id, most)
        if answer.ByteSize() <= _STATUS:
            break
    return answer


def _status(error: errors.PlexusError, request_id: str, most: int) -> status_pb2.Status:
    facts = {key: _short(value, most) for key, value in error.metadata.items()}
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts))]
    if isinstance(error, errors.InvalidArgumentError) and error.violations:
        details.append(
            _pack(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=_short(violation.field, most),
                            description=_short(violation.description, most),
                        )
                        for violation in error.violations[:_VIOLATIONS]
                    ]
                )
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if request_id:
        details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    code: int = code_of(error).value[0]
    return status_pb2.Status(code=code, message=_short(error.message, _MESSAGE), details=details)


def from_rpc_error(error: grpc.aio.AioRpcError, *, dependency: str) -> errors.PlexusError:
    """The domain error that another service's failure means here.

    Its code, message, reason and metadata are kept; UNAVAILABLE gets the dependency's name, and what the
    callee did not explain (UNKNOWN, INTERNAL) becomes INTERNAL here too.
    """
    found = problem(error)
    reason = found.reason or None
    kind = _CLASSES.get(found.code)
    if kind is errors.UnavailableError:
        return errors.UnavailableError(f"{dependency} is unavailable", dependency=dependency, reason=reason)
    if kind is errors.InvalidArgumentError:
        violations = [errors.FieldViolation(v.field, v.description) for v in found.violations]
        return errors.InvalidArgumentError(
            found.message, violations=violations, reason=reason, metadata=found.metadata
        )
    if kind is None:
        return errors.PlexusError(f"{dependency} failed", metadata={"dependency": dependency})
    return kind(found.message, reason=reason, metadata=found.metadata)
