"""What a broker keeps beside what it delivers: dead letters and logs; and which of it is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Stored

MAX_RATE = 100_000.0
MAX_CHOSEN = 1000
"""Ids of dead letters in one request."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up; `history` holds pairs of time and reason, the newest last."""

    id: str
    message: Stored
    died: float
    reason: str
    attempts: int
    history: list[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Where:
    """Which dead letters: all whose every given property holds.

    Attributes:
        ids: One of these; empty is any.
        reason: Occurs in its reason.
        topic: It was published to.
        after: It died at or after, seconds since 1970.
        before: It died before; 0 is no bound.
    """

    ids: Sequence[str] = ()
    reason: str = ""
    topic: str = ""
    after: float = 0.0
    before: float = 0.0

    def __post_init__(self) -> None:
        if len(self.ids) > MAX_CHOSEN:
            raise InvalidArgumentError(f"at most {MAX_CHOSEN}", field="ids")


@dataclass(frozen=True, slots=True)
class Redrive:
    """How dead letters are delivered again: to this topic instead of their subscription, at this rate."""

    topic: str = ""
    per_second: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.per_second <= MAX_RATE:
            raise InvalidArgumentError(f"must be 0 to {MAX_RATE:g}", field="max_per_second")


@dataclass(frozen=True, slots=True)
class DeadLetterStats:
    """Counts of dead letters by reason; when the first and the last died, 0 without any."""

    total: int
    reasons: dict[str, int]
    oldest: float
    newest: float


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of a topic's log; `sequence` rises, with gaps."""

    sequence: int
    message: Stored


@dataclass(frozen=True, slots=True)
class Events:
    """Which events of a log: all whose every given property holds; times are seconds since 1970.

    Attributes:
        kind: Value of the attribute `type`.
        correlation_id: Of the work.
        ordering_key: Of the message.
        after: Published at or after.
        before: Published before; 0 is no bound.
        from_sequence: At or after this number.
    """

    kind: str = ""
    correlation_id: str = ""
    ordering_key: str = ""
    after: float = 0.0
    before: float = 0.0
    from_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where a subscription is set to: a time (seconds since 1970), a sequence number of a log, a snapshot."""

    time: float | None = None
    sequence: int | None = None
    snapshot: str = ""

    def __post_init__(self) -> None:
        if (self.time is not None) + (self.sequence is not None) + bool(self.snapshot) != 1:
            raise InvalidArgumentError("needs a time, a sequence or a snapshot", field="position")
