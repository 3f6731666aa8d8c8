"""When a schedule fires: pure functions of what it says and of instants, which are in UTC."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.queueing.schedules import cron

_SECOND = timedelta(seconds=1)
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """Times of an expression on the clocks of a zone; refuses what is neither."""

    expression: str
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        cron.check(self.expression, self.time_zone)

    def after(self, after: datetime) -> datetime | None:
        """The first time after an instant."""
        return cron.next_time(self.expression, self.time_zone, after)


@dataclass(frozen=True, slots=True)
class At:
    """One time."""

    time: datetime

    def after(self, after: datetime) -> datetime | None:
        """The first time after an instant."""
        return self.time if self.time > after else None


@dataclass(frozen=True, slots=True)
class Every:
    """Times at a fixed interval, counted from an anchor in both directions."""

    interval: timedelta
    anchor: datetime

    def after(self, after: datetime) -> datetime | None:
        """The first time after an instant."""
        try:
            return self.anchor + ((after - self.anchor) // self.interval + 1) * self.interval
        except OverflowError:
            return None


@dataclass(frozen=True, slots=True)
class Timing:
    """When a schedule fires.

    Attributes:
        times: Its times.
        jitter: Each firing is put off by a part of this.
        start: No time before.
        end: No time from then on.
    """

    times: Cron | At | Every
    jitter: timedelta = timedelta()
    start: datetime | None = None
    end: datetime | None = None


def next_due(timing: Timing, after: datetime) -> datetime | None:
    """The first time after an instant; None at the end."""
    if timing.start is not None:
        after = max(after, timing.start - _TICK)
    due = timing.times.after(after)
    return None if due is None or (timing.end is not None and due >= timing.end) else due


def latest_due(timing: Timing, after: datetime, until: datetime) -> datetime | None:
    """The last time after one instant and not after another, however many lie between."""
    low = next_due(timing, after)
    if low is None or low > until:
        return None
    if isinstance(timing.times, Every):
        if timing.end is not None:
            until = min(until, timing.end - _TICK)
        return (
            timing.times.anchor
            + (until - timing.times.anchor) // timing.times.interval * timing.times.interval
        )
    high = until  # times are whole seconds, so that halving finds the last of them
    while high - low >= _SECOND:
        due = next_due(timing, low + (high - low) / 2)
        if due is not None and due <= until:
            low = due
        else:
            high = low + (high - low) / 2
    return low


def dues(timing: Timing, after: datetime, *, limit: int, until: datetime | None = None) -> list[datetime]:
    """The first times after an instant, up to and with another if given."""
    found: list[datetime] = []
    while len(found) < limit:
        due = next_due(timing, after)
        if due is None or (until is not None and due > until):
            break
        found.append(due)
        after = due
    return found


def latest_dues(timing: Timing, after: datetime, until: datetime, *, limit: int) -> list[datetime]:
    """The last times after one instant and not after another, oldest first."""
    found: list[datetime] = []
    while len(found) < limit:
        due = latest_due(timing, after, until)
        if due is None:
            break
        found.append(due)
        until = due - _TICK
    return found[::-1]


def fires(name: str, jitter: timedelta, due: datetime) -> datetime:
    """When the schedule of this name fires for one of its times: the same for everybody who asks."""
    if not jitter:
        return due
    digest = hashlib.sha256(f"{name}\0{due.astimezone(UTC).isoformat()}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") / 2**64
    return due + jitter * part
