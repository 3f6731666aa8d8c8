"""Domain errors: what code raises, free of gRPC, mapped to a status in one place (runtime.status)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path as in the proto (`points[3].vector`) and why."""

    field: str
    description: str


class PlexusError(Exception):
    """Base of all domain errors.

    Attributes:
        message: One sentence for the caller; never contains payloads, secrets or host paths.
        reason: UPPER_SNAKE constant for programs, stable across versions (google.aip.dev/193).
        metadata: String facts for programs, such as the resource's name.
        retry_after_s: When to try again, in seconds, if the server knows.
    """

    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = metadata or {}
        self.retry_after_s = retry_after_s


class InvalidArgumentError(PlexusError):
    """The request is wrong whatever the state of the system; carries the fields at fault."""

    default_reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        violations: list[FieldViolation] | None = None,
        reason: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = list(violations or [])
        if field is not None:
            self.violations.append(FieldViolation(field, message))


class OutOfRangeError(PlexusError):
    """A position past the end of what exists, such as a byte range beyond an object."""

    default_reason = "OUT_OF_RANGE"


class NotFoundError(PlexusError):
    """The named resource does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExistsError(PlexusError):
    """The resource to create exists already, with other content."""

    default_reason = "ALREADY_EXISTS"


class FailedPreconditionError(PlexusError):
    """The system is not in the state that the request needs; retrying alone does not help."""

    default_reason = "FAILED_PRECONDITION"


class AbortedError(PlexusError):
    """A concurrent change won (a lost if_match, a conflicting update); read again and retry."""

    default_reason = "ABORTED"


class UnauthenticatedError(PlexusError):
    """The caller's identity is missing or not believed."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(PlexusError):
    """The caller is known and may not do this."""

    default_reason = "PERMISSION_DENIED"


class ResourceExhaustedError(PlexusError):
    """A bound was reached: queue, concurrency, size, quota or disk."""

    default_reason = "RESOURCE_EXHAUSTED"


class UnavailableError(PlexusError):
    """A dependency is away for now; metadata names it under `dependency`."""

    default_reason = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        dependency: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            message,
            reason=reason,
            metadata={"dependency": dependency} if dependency else None,
            retry_after_s=retry_after_s,
        )


class DeadlineExceededError(PlexusError):
    """The work did not finish within the caller's deadline."""

    default_reason = "DEADLINE_EXCEEDED"


class UnimplementedError(PlexusError):
    """The configured backend cannot do this."""

    default_reason = "UNIMPLEMENTED"


class DataLossError(PlexusError):
    """Stored data is damaged: a checksum does not match."""

    default_reason = "DATA_LOSS"
