"""Times of cron expressions, across changes of the clocks.

cronsim reads an expression and walks the times on the wall, without a zone; what a wall shows becomes an
instant here, for expressions with seconds as for those without. As in Debian's cron, an expression for fixed
times fires once where clocks change: at the first instant that exists, or the first time of two. One whose
minute or hour begins with `*` goes by elapsed time: what does not exist is left out, what comes twice fires
twice.
"""

from __future__ import annotations

import copy
import zoneinfo
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from cronsim import CronSim, CronSimError

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from datetime import tzinfo

MAX_EXPRESSION = 256
_SECOND = timedelta(seconds=1)
_NEAR = timedelta(hours=4)
"""Clocks are set by less than this, but for days that whole countries leave out."""
_NAMED = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_PARTS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_LOCAL = frozenset({"localtime", "Factory"})
"""Not zones: what they mean differs from host to host."""


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones() - _LOCAL)


def zone_of(name: str) -> tzinfo:
    """The time zone of a name in the IANA database.

    Raises:
        InvalidArgumentError: There is none.
    """
    if name == "UTC":
        return UTC
    if name not in _zones():
        raise InvalidArgumentError(
            f"{name[:64]!r} is no name of the IANA time zone database, such as Europe/Berlin",
            field="schedule.cron.time_zone",
            reason="UNKNOWN_TIME_ZONE",
        )
    return zoneinfo.ZoneInfo(name)


def _wrong(why: str, part: str = "") -> InvalidArgumentError:
    return InvalidArgumentError(
        why,
        field="schedule.cron.expression",
        reason="INVALID_CRON",
        metadata={"part": part} if part else None,
    )


@lru_cache(maxsize=4096)
def _parsed(expression: str) -> CronSim:
    if len(expression) > MAX_EXPRESSION:
        raise _wrong(f"at most {MAX_EXPRESSION} characters")
    if expression.startswith("@"):
        if expression.lower() not in _NAMED:
            raise _wrong(f"{expression!r} is none of {', '.join(_NAMED)}")
        expression = _NAMED[expression.lower()]
    texts = expression.split()
    names = _PARTS[len(_PARTS) - len(texts) :]
    if len(texts) not in {5, 6}:
        raise _wrong(
            f"needs 5 parts (minute to day-of-week), or 6 with the second first; these are {len(texts)}"
        )
    try:
        return CronSim(expression, datetime(2000, 1, 1))  # noqa: DTZ001 - a time on the wall has no zone
    except CronSimError as error:
        # It says `Bad minute`.
        part = str(error).removeprefix("Bad ")
        text = dict(zip(names, texts, strict=True)).get(part, "")
        raise _wrong(f"{part}: {text!r} is not valid", part) from error


def check(expression: str, time_zone: str) -> None:
    """Refuse what is no cron expression or no time zone.

    Raises:
        InvalidArgumentError: Which part of the expression is wrong, in its text and its metadata `part`.
    """
    _parsed(expression)
    zone_of(time_zone)


@lru_cache(maxsize=4096)  # many schedules share an expression, and each asks twice
def next_time(expression: str, time_zone: str, after: datetime) -> datetime | None:
    """The first time of an expression after an instant, in UTC; None if there is none in 50 years.

    Raises:
        InvalidArgumentError: As `check`.
    """
    prototype, zone = _parsed(expression), zone_of(time_zone)
    elapsed = any(part.startswith("*") for part in prototype.parts[1:3])
    try:
        return (_by_elapsed_time if elapsed else _by_the_wall)(prototype, zone, after)
    except (StopIteration, OverflowError):
        return None


def _walls(prototype: CronSim, after: datetime) -> CronSim:
    """Matching times on the wall after one; its iterator."""
    walls = copy.copy(prototype)
    walls.dt = after.replace(microsecond=0)
    return walls


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _offset(instant: datetime, zone: tzinfo) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta()


def _instant(wall: datetime, zone: tzinfo, fold: int = 0) -> datetime:
    return wall.replace(tzinfo=zone, fold=fold).astimezone(UTC)


def _change(zone: tzinfo, low: datetime, high: datetime) -> datetime:
    """The first whole second after `low` with another offset, where `high` has another."""
    offset = _offset(low, zone)
    low = low.replace(microsecond=0)
    while high - low > _SECOND:
        middle = low + (high - low) // 2
        middle = middle.replace(microsecond=0)
        if middle <= low:
            break
        if _offset(middle, zone) == offset:
            low = middle
        else:
            high = middle
    return high.replace(microsecond=0)


def _by_the_wall(prototype: CronSim, zone: tzinfo, after: datetime) -> datetime:
    walls = _walls(prototype, _wall(after, zone))
    while True:
        wall = next(walls)
        instant = _instant(wall, zone)
        if _wall(instant, zone) != wall:  # it does not exist: the two readings lie around the gap
            instant = _change(zone, _instant(wall, zone, fold=1), instant)
        if instant > after:
            return instant


def _by_elapsed_time(prototype: CronSim, zone: tzinfo, after: datetime) -> datetime:
    offset = _offset(after, zone)
    if _offset(after + _NEAR, zone) != offset:
        change = _change(zone, after, after + _NEAR)
        found = _with_offset(next(_walls(prototype, _wall(after, zone))), offset)
        if found < change:
            return found
        offset = _offset(change, zone)
        after = change - _SECOND
    start = (after + offset).replace(tzinfo=None)
    walls = _walls(prototype, start)
    while True:
        wall = next(walls)
        if wall - start < _NEAR:
            return _with_offset(wall, offset)
        instant = _instant(wall, zone)
        if _wall(instant, zone) == wall:
            return instant


def _with_offset(wall: datetime, offset: timedelta) -> datetime:
    return (wall - offset).replace(tzinfo=UTC)
