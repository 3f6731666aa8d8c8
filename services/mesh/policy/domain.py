"""What a traffic policy says, and where policies are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_BYTES = 512 * 1024
"""Longest text of a policy; Consul's KV takes no longer value."""
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_MIN_BACKOFF = timedelta(milliseconds=5)
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def span(text: object) -> timedelta:
    """Read a length of time such as `250ms`, `2s`, `1.5m` or `1h`.

    Raises:
        ValueError: It is none, or not positive.
    """
    if isinstance(text, timedelta):
        return text
    match = _SPAN.fullmatch(text) if isinstance(text, str) else None
    value = timedelta(seconds=float(match[1]) * _UNIT_S[match[2]]) if match else timedelta()
    if value <= timedelta():
        raise ValueError("needs a length of time with its unit, such as 250ms, 2s or 1m")
    return value


Span = Annotated[timedelta, BeforeValidator(span)]
Percent = Annotated[float, Field(gt=0, le=100)]
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
Header = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,127}$")]
Weight = Annotated[int, Field(ge=0, le=1_000_000)]
RetryCode = Literal["cancelled", "deadline_exceeded", "internal", "resource_exhausted", "unavailable"]
Code = Literal[
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoadBalancing(_Model):
    """How an instance is chosen."""

    policy: Literal["round_robin", "ring_hash"] = "round_robin"
    """round_robin, where weights of instances count; or ring_hash, where equal headers meet one instance."""
    header: Header | None = None
    """Header that ring_hash goes by; a call without it is sent anywhere."""
    min_ring_size: Annotated[int, Field(ge=1, le=4096)] = 1024
    """Entries of the ring; more make shares more even. gRPC clients cap it at 4096."""

    @model_validator(mode="after")
    def _header(self) -> LoadBalancing:
        if (self.policy == "ring_hash") != (self.header is not None):
            raise ValueError("ring_hash needs a header, and only ring_hash has one")
        return self


class BackOff(_Model):
    """Pause between attempts; doubled each time, with jitter."""

    base: Span = timedelta(milliseconds=25)
    """First pause, at least 5ms: of one that rounds to nothing C-core does not wake up."""
    max: Span = timedelta(milliseconds=250)
    """Longest pause."""

    @model_validator(mode="after")
    def _order(self) -> BackOff:
        if self.max < self.base:
            raise ValueError("max is shorter than base")
        if self.base < _MIN_BACKOFF:
            raise ValueError("base is shorter than 5ms")
        return self


class RetryBudget(_Model):
    """Bound on retries, kept by the servers: beyond it they tell callers not to try again."""

    percent: Percent = 10
    """Retries as a share of first attempts."""
    min_per_second: Annotated[float, Field(ge=0, le=10_000)] = 1
    """Retries that are always allowed, so that a quiet service has some."""


class Retry(_Model):
    """When callers try again."""

    codes: Annotated[tuple[RetryCode, ...], Field(min_length=1)] = ("unavailable", "cancelled")
    """Statuses that are tried again. Cancelled is what a stopping server says to a late call; a
    caller that cancels its own call does not get here."""
    attempts: Annotated[int, Field(ge=1, le=5)] = 3
    """All attempts, the first included; 1 is none more. gRPC allows five."""
    backoff: BackOff = BackOff()
    budget: RetryBudget = RetryBudget()


class CircuitBreaker(_Model):
    """Bound on concurrency, kept by each calling process."""

    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Calls in progress; one more fails at once with UNAVAILABLE."""


class OutlierDetection(_Model):
    """When an instance that fails calls is set aside."""

    interval: Span = timedelta(seconds=1)
    """How often failures are counted."""
    failure_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """Share of failed calls in an interval from which on it is set aside."""
    min_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    """Calls to an instance in an interval that are needed for a judgement."""
    min_hosts: Annotated[int, Field(ge=1, le=1000)] = 2
    """Instances with that many calls that are needed for a judgement."""
    ejection: Span = timedelta(seconds=15)
    """Time aside, multiplied by how often it happened; longer than a lease, so that an instance that hangs
    has left the catalogue before it would be tried again."""
    max_ejected_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """Share of instances that may be aside."""


class Delay(_Model):
    """Calls that wait before they are sent."""

    duration: Span
    """How long."""
    percent: Percent = 100
    """Share of calls."""


class Abort(_Model):
    """Calls that fail without being sent; callers do not try them again."""

    code: Code = "unavailable"
    """Status they get."""
    percent: Percent = 100
    """Share of calls."""


class Fault(_Model):
    """Failures made on purpose, to test callers."""

    delay: Delay | None = None
    abort: Abort | None = None

    @model_validator(mode="after")
    def _any(self) -> Fault:
        if self.delay is None and self.abort is None:
            raise ValueError("needs delay, abort or both")
        return self


class Subset(_Model):
    """Instances of some versions and their share of the traffic."""

    version: str | None = None
    """Version of its instances; `*` stands for any text, as in `2.*`."""
    tag: str | None = None
    """Tag that its instances have."""
    weight: Weight = 0
    """Share relative to the other subsets; 0: only for routes that name it."""

    @model_validator(mode="after")
    def _one(self) -> Subset:
        if (self.version is None) == (self.tag is None):
            raise ValueError("needs either version or tag")
        return self

    def holds(self, version: str, tags: tuple[str, ...]) -> bool:
        """Tell whether an instance belongs to it."""
        return fnmatchcase(version, self.version) if self.version is not None else self.tag in tags


class HeaderMatch(_Model):
    """Condition on a header; exactly one of the five."""

    name: Header
    exact: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    contains: str | None = None
    present: bool | None = None
    invert: bool = False
    """The condition must not hold."""

    @model_validator(mode="after")
    def _one(self) -> HeaderMatch:
        texts = (self.exact, self.prefix, self.suffix, self.contains)
        if sum(given is not None for given in (*texts, self.present)) != 1:
            raise ValueError("needs exactly one of exact, prefix, suffix, contains, present")
        if "" in (self.prefix, self.suffix, self.contains):
            raise ValueError("an empty text matches everything")
        return self


class Match(_Model):
    """Which calls a route takes; all conditions must hold."""

    method: Annotated[str, Field(pattern=r"^/[\w.]+/\w+$")] | None = None
    """One method, as `/package.Service/Method`."""
    prefix: Annotated[str, Field(pattern=r"^/[\w./]+$")] | None = None
    """Methods that begin so, as `/package.Service/`."""
    headers: tuple[HeaderMatch, ...] = ()

    @model_validator(mode="after")
    def _any(self) -> Match:
        if self.method is not None and self.prefix is not None:
            raise ValueError("needs one of method and prefix, not both")
        if self.method is None and self.prefix is None and not self.headers:
            raise ValueError("needs a method, a prefix or headers")
        return self


class Route(_Model):
    """Calls that are treated differently.

    The first route that matches decides; what it leaves out is as the policy itself says.
    """

    match: Match
    subsets: Mapping[Name, Weight] | None = None
    """Shares by subset; default: the weights of the subsets."""
    timeout: Span | None = None
    retry: Retry | None = None
    fault: Fault | None = None


class Locality(_Model):
    """Callers prefer instances of their own zone and go elsewhere when none of those can be reached."""

    failover: Mapping[str, tuple[str, ...]] = {}
    """By the caller's zone: where next, in order; zones not named come last, together."""


class Policy(_Model):
    """Everything callers of one service are told."""

    service: Name
    """Whose policy it is; the file is named after it."""
    lb: LoadBalancing = LoadBalancing()
    timeout: Span | None = None
    """Longest call, streams included; a caller's shorter deadline counts."""
    retry: Retry = Retry()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    outlier_detection: OutlierDetection | None = OutlierDetection()
    """null: nobody is set aside."""
    fault: Fault | None = None
    subsets: Mapping[Name, Subset] = {}
    """Instances by version. An instance of no subset gets no traffic; a subset without an instance gives its
    share to the others."""
    routes: tuple[Route, ...] = ()
    locality: Locality | None = None
    """Default: all zones alike."""

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.subsets and not any(subset.weight for subset in self.subsets.values()):
            raise ValueError("subsets: no subset has a weight")
        for number, route in enumerate(self.routes):
            if route.subsets is None:
                continue
            if unknown := sorted(set(route.subsets) - set(self.subsets)):
                raise ValueError(f"routes[{number}].subsets: no subset is named {unknown[0]!r}")
            if not any(route.subsets.values()):
                raise ValueError(f"routes[{number}].subsets: no subset has a weight")
        return self


class PolicyError(InvalidArgumentError):
    """A policy file is not valid; the text says file, line and reason of each problem."""

    default_reason = "POLICY_INVALID"


@dataclass(frozen=True, slots=True)
class Document:
    """A policy as it was written.

    Attributes:
        origin: Where it is kept, such as a file name or a key; errors begin with it.
        text: YAML.
    """

    origin: str
    text: str


class PolicyStore(Protocol):
    """Where the texts of policies are kept, by service; it does not judge them."""

    async def read(self) -> dict[str, Document]:
        """All documents.

        Raises:
            UnavailableError: The store is away.
        """
        ...

    async def write(self, documents: Mapping[str, str], *, remove: frozenset[str] = frozenset()) -> None:
        """Write texts and remove others, all or nothing as far as the store can.

        Raises:
            UnavailableError: The store is away.
            FailedPreconditionError: It cannot be written.
        """
        ...

    def watch(self) -> AsyncIterator[dict[str, Document]]:
        """All documents now and again after each change, for ever; a store that is away tells nothing."""
        ...
