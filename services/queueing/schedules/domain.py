"""Schedules, their runs, and the bounds of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

from services.queueing.domain import check_messages
from services.queueing.resources import check_name
from services.queueing.schedules import timing
from services.queueing.schedules.timing import At, Cron, Every, Timing
from services.runtime.errors import FieldViolation, InvalidArgumentError

if TYPE_CHECKING:
    from services.queueing.domain import Message

MAX_DATA_BYTES = 256 * 1024
"""Content of a scheduled message: a database holds it, for as long as the schedule is there."""
MAX_JITTER = timedelta(days=1)
MAX_MISSED = 1000
MAX_INTERVAL = timedelta(days=366)
MAX_PREVIEW = 100
HISTORY = 100
"""Runs of a schedule that are kept."""
NAME_ATTRIBUTE = "plexus-schedule"
DUE_ATTRIBUTE = "plexus-schedule-due"
_GAPS = 5
"""Firings whose distances are compared with the jitter."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(instant: datetime) -> int:
    """An instant as microseconds since 1970, exactly."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


def instant(microseconds: int) -> datetime:
    """The inverse of `microseconds`."""
    return _EPOCH + timedelta(microseconds=microseconds)


class MissedRuns(StrEnum):
    """What becomes of firings that were missed."""

    SKIP = "skip"
    ONCE = "once"
    ALL = "all"


class State(StrEnum):
    """What a schedule is doing."""

    ACTIVE = "active"
    PAUSED = "paused"
    COMPLETED = "completed"


class RunState(StrEnum):
    """How a run went; PENDING is being published."""

    PENDING = "pending"
    PUBLISHED = "published"
    MISSED = "missed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Definition:
    """What a person says of a schedule.

    Attributes:
        timing: When it fires.
        topic: Where it publishes.
        message: What.
        missed_runs: What becomes of firings that were missed.
        max_missed_runs: With ALL, how many are made up.
        max_firings: Done after so many; 0 is no bound.
    """

    timing: Timing
    topic: str
    message: Message
    missed_runs: MissedRuns = MissedRuns.ONCE
    max_missed_runs: int = 100
    max_firings: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as it stands.

    Attributes:
        name: Of the schedule.
        uid: Of this one, should another have the same name one day.
        definition: What it does.
        created: When it was made.
        updated: When it was last changed.
        paused: Whether it does not fire.
        revision: Counts changes from 1.
        next_due: Its next time; None if it does not fire.
        last_fired: When it last published.
        last_error: Why its last run published nothing.
        firings: Times that it decided to publish at.
        missed: Times that were not made up.
        runs: The number of its last run.
    """

    name: str
    uid: str
    definition: Definition
    created: datetime
    updated: datetime
    paused: bool = False
    revision: int = 1
    next_due: datetime | None = None
    last_fired: datetime | None = None
    last_error: str = ""
    firings: int = 0
    missed: int = 0
    runs: int = 0

    @property
    def state(self) -> State:
        """What it is doing."""
        if self.paused:
            return State.PAUSED
        return State.COMPLETED if self.next_due is None else State.ACTIVE

    @property
    def next_fire(self) -> datetime | None:
        """Its next time, jitter included."""
        return None if self.next_due is None else self.fires(self.next_due)

    def fires(self, due: datetime) -> datetime:
        """When it fires for one of its times."""
        return timing.fires(self.name, self.definition.timing.jitter, due)

    def from_now(self, now: datetime) -> Schedule:
        """Itself with its next time after now, or none while it is paused or when it is done."""
        limit = self.definition.max_firings
        done = self.paused or (limit and self.firings >= limit)
        return replace(self, next_due=None if done else timing.next_due(self.definition.timing, now))


@dataclass(frozen=True, slots=True)
class Run:
    """What a schedule did at one of its times; numbers count from 1."""

    number: int
    due: datetime
    state: RunState
    revision: int
    manual: bool = False
    ended: datetime | None = None
    message_id: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Firing:
    """A run that this replica is to publish; nobody else does for the time of its lease."""

    uid: str
    name: str
    fires: datetime
    run: Run
    topic: str
    message: Message

    def published_as(self) -> Message:
        """The message with the identity of this firing, the same however often it is repeated."""
        attributes = {
            **self.message.attributes,
            NAME_ATTRIBUTE: self.name,
            DUE_ATTRIBUTE: self.run.due.isoformat().replace("+00:00", "Z"),
        }
        dedup_id = f"schedule:{self.uid}:{self.run.number}:{microseconds(self.run.due)}"
        return replace(self.message, attributes=attributes, dedup_id=dedup_id)


def check(name: str, definition: Definition, *, shortest: timedelta) -> None:
    """Apply the bounds of a schedule, whatever the time is.

    Args:
        name: Of the schedule.
        definition: What it is to do.
        shortest: The shortest interval of `every`.

    Raises:
        InvalidArgumentError: Which field is wrong and why.
    """
    check_name(name, "schedule.name")
    check_timing(definition.timing, shortest=shortest)
    check_name(definition.topic, "schedule.topic")
    if not 1 <= definition.max_missed_runs <= MAX_MISSED:
        raise InvalidArgumentError(f"must be 1 to {MAX_MISSED}", field="schedule.max_missed_runs")
    if definition.max_firings < 0:
        raise InvalidArgumentError("must not be negative", field="schedule.max_firings")
    message = definition.message
    if message.dedup_id:
        raise InvalidArgumentError("each firing has one of its own", field="schedule.message.dedup_id")
    if len(message.data) > MAX_DATA_BYTES:
        raise InvalidArgumentError(f"at most {MAX_DATA_BYTES} bytes", field="schedule.message.data")
    sample = Firing("", name, _EPOCH, Run(1, _EPOCH, RunState.PENDING, 1), definition.topic, message)
    try:
        check_messages([sample.published_as()])
    except InvalidArgumentError as error:
        violations = [
            FieldViolation(v.field.replace("messages[0]", "schedule.message"), v.description)
            for v in error.violations
        ]
        raise InvalidArgumentError(error.message, violations=violations) from error


def check_timing(when: Timing, *, shortest: timedelta) -> None:
    """Apply the bounds of when a schedule fires; see `check`."""
    if when.start is not None and when.end is not None and when.end <= when.start:
        raise InvalidArgumentError(
            "must be after start_time", field="schedule.end_time", reason="END_BEFORE_START"
        )
    if not timedelta() <= when.jitter <= MAX_JITTER:
        raise InvalidArgumentError("must be 0 to 24 h", field="schedule.jitter")
    if isinstance(when.times, Every):
        if when.times.interval < shortest:
            raise InvalidArgumentError(
                f"must be at least {shortest.total_seconds():g} s",
                field="schedule.every.interval",
                reason="INTERVAL_TOO_SHORT",
            )
        if when.times.interval > MAX_INTERVAL:
            raise InvalidArgumentError(
                f"must be at most {MAX_INTERVAL.days} days",
                field="schedule.every.interval",
                reason="INTERVAL_TOO_LONG",
            )
    first = timing.dues(replace(when, start=None, end=None), _EPOCH, limit=_GAPS) if when.jitter else []
    if any(later - earlier <= when.jitter for earlier, later in pairwise(first)):
        raise InvalidArgumentError("must be shorter than the time between firings", field="schedule.jitter")


def check_fires(when: Timing, now: datetime) -> datetime:
    """The first time after now.

    Raises:
        InvalidArgumentError: There is none.
    """
    due = timing.next_due(when, now)
    if due is not None:
        return due
    if isinstance(when.times, At) and when.times.time <= now:
        raise InvalidArgumentError("is not in the future", field="schedule.at", reason="AT_IN_PAST")
    ended = when.end is not None and when.end <= now
    field = "schedule.end_time" if ended or not isinstance(when.times, Cron) else "schedule.cron.expression"
    raise InvalidArgumentError("leaves no time to fire at", field=field, reason="NEVER_FIRES")
