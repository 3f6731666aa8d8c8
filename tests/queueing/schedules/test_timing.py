"""When schedules fire: against calendars counted out by hand and by brute force, and what is refused."""

from __future__ import annotations

import random
import zoneinfo
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from services.queueing.schedules import timing
from services.queueing.schedules.cron import next_time, zone_of
from services.queueing.schedules.timing import At, Cron, Every, Timing
from services.runtime.errors import InvalidArgumentError

MINUTE = timedelta(minutes=1)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]  # a date and a time of any length


def local(expression: str, zone: str, after: datetime, count: int) -> list[str]:
    """The next times as the clocks of the zone show them."""
    found = timing.dues(Timing(Cron(expression, zone)), after, limit=count)
    return [each.astimezone(zone_of(zone)).strftime("%m-%d %H:%M%z") for each in found]


@pytest.mark.parametrize(
    ("expression", "zone", "after", "expected"),
    [
        # Berlin sets its clocks from 02:00 to 03:00 on 29 March 2026, Sydney on 4 October, New York on 8
        # March.
        ("30 2 * * *", "Europe/Berlin", utc(2026, 3, 28, 12), ["03-29 03:00+0200", "03-30 02:30+0200"]),
        ("0,30 2 * * *", "Europe/Berlin", utc(2026, 3, 28, 12), ["03-29 03:00+0200", "03-30 02:00+0200"]),
        ("0 2,3 * * *", "Europe/Berlin", utc(2026, 3, 28, 12), ["03-29 03:00+0200", "03-30 02:00+0200"]),
        ("15 30 2 * * *", "Europe/Berlin", utc(2026, 3, 28, 12), ["03-29 03:00+0200", "03-30 02:30+0200"]),
        ("30 2 * * *", "Australia/Sydney", utc(2026, 10, 3, 12), ["10-04 03:00+1100", "10-05 02:30+1100"]),
        ("30 2 8 3 *", "America/New_York", utc(2026, 3, 1), ["03-08 03:00-0400", "03-08 02:30-0500"]),
        # And back: Berlin from 03:00 to 02:00 on 25 October, Sydney on 5 April.
        ("30 2 * * *", "Europe/Berlin", utc(2026, 10, 24, 12), ["10-25 02:30+0200", "10-26 02:30+0100"]),
        ("5 30 2 * * *", "Europe/Berlin", utc(2026, 10, 24, 12), ["10-25 02:30+0200", "10-26 02:30+0100"]),
        ("30 2 * * *", "Australia/Sydney", utc(2026, 4, 4, 12), ["04-05 02:30+1100", "04-06 02:30+1000"]),
        # Asked between the two: the second time is no firing.
        ("30 2 * * *", "Europe/Berlin", utc(2026, 10, 25, 0, 45), ["10-26 02:30+0100"]),
        # What goes by elapsed time.
        ("30 * * * *", "Europe/Berlin", utc(2026, 3, 29, 0, 0), ["03-29 01:30+0100", "03-29 03:30+0200"]),
        (
            "30 * * * *",
            "Europe/Berlin",
            utc(2026, 10, 25, 0, 0),
            ["10-25 02:30+0200", "10-25 02:30+0100", "10-25 03:30+0100"],
        ),
        # Lord Howe sets its clocks by half an hour.
        ("45 1 * * *", "Australia/Lord_Howe", utc(2026, 4, 4), ["04-05 01:45+1100", "04-06 01:45+1030"]),
        (
            "*/20 * * * *",
            "Australia/Lord_Howe",
            utc(2026, 4, 4, 14, 25),
            ["04-05 01:40+1100", "04-05 01:40+1030", "04-05 02:00+1030"],
        ),
        ("15 2 * * *", "Australia/Lord_Howe", utc(2026, 10, 3), ["10-04 02:30+1100", "10-05 02:15+1100"]),
        # Samoa left out 30 December 2011.
        ("0 9 * * *", "Pacific/Apia", utc(2011, 12, 29, 10), ["12-29 09:00-1000", "12-31 00:00+1400"]),
        # Leap days, ends of years and months, names.
        ("0 0 29 2 *", "UTC", utc(2026, 1, 1), ["02-29 00:00+0000"]),
        ("0 0 31 12 *", "Asia/Tokyo", utc(2026, 12, 30, 14), ["12-31 00:00+0900", "12-31 00:00+0900"]),
        ("@yearly", "Asia/Kathmandu", utc(2026, 12, 31), ["01-01 00:00+0545"]),
        ("@monthly", "UTC", utc(2026, 11, 21), ["12-01 00:00+0000", "01-01 00:00+0000"]),
        ("@weekly", "UTC", utc(2026, 11, 21), ["11-22 00:00+0000"]),
        ("@daily", "UTC", utc(2026, 11, 21), ["11-22 00:00+0000"]),
        ("@Hourly", "UTC", utc(2026, 11, 21), ["11-21 01:00+0000"]),
        ("0 12 * jan-mar mon,WED", "UTC", utc(2026, 11, 21), ["01-04 12:00+0000", "01-06 12:00+0000"]),
        ("0 0 L * *", "UTC", utc(2028, 2, 1), ["02-29 00:00+0000", "03-31 00:00+0000"]),
        ("0 0 * * FRI#2", "UTC", utc(2026, 11, 1), ["11-13 00:00+0000"]),
        ("0 0 13 * FRI", "UTC", utc(2026, 11, 1), ["11-06 00:00+0000", "11-13 00:00+0000"]),
    ],
)
def test_cron_fires_when_the_calendar_says(
    expression: str, zone: str, after: datetime, expected: list[str]
) -> None:
    assert local(expression, zone, after, len(expected)) == expected


ZONES = (
    "Europe/Berlin",
    "America/New_York",
    "Australia/Sydney",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "UTC",
)


@pytest.mark.parametrize("seed", range(8))
def test_cron_agrees_with_every_minute_of_a_year_looked_at(seed: int) -> None:
    """Two weeks around each change of the clocks, expected times found without any cron library."""
    chance = random.Random(seed)
    zone = zoneinfo.ZoneInfo(chance.choice(ZONES))
    minutes = set(chance.sample(range(60), chance.randint(1, 4)))
    hours = set(chance.sample(range(5), chance.randint(1, 3)))
    elapsed = chance.random() < 0.5
    if elapsed:
        hours = set(range(24))
    hour_part = "*" if elapsed else ",".join(map(str, sorted(hours)))
    expression = f"{','.join(map(str, sorted(minutes)))} {hour_part} * * *"
    start = datetime(2026, chance.choice([3, 4, 10]), 1, tzinfo=UTC) - timedelta(days=3)
    instants = [start + n * MINUTE for n in range(60 * 24 * 40)]
    shown = [instant.astimezone(zone).replace(tzinfo=None) for instant in instants]
    expected: list[datetime] = []
    seen: set[datetime] = set()
    for position, (instant, wall) in enumerate(zip(instants, shown, strict=True)):
        skipped = []
        if position and wall - shown[position - 1] > MINUTE:
            skipped = [
                gone
                for n in range(1, (wall - shown[position - 1]) // MINUTE)
                if (gone := shown[position - 1] + n * MINUTE).minute in minutes and gone.hour in hours
            ]
        wanted = wall.minute in minutes and wall.hour in hours
        if wanted if elapsed else ((wanted and wall not in seen) or skipped):
            expected.append(instant)
        seen.add(wall)
    # The first day only fills `seen`.
    begin = start + timedelta(days=1)
    expected = [each for each in expected if each > begin]
    found = timing.dues(Timing(Cron(expression, str(zone))), begin, limit=len(expected))
    assert found == expected


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("61 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 32 * *", "day-of-month"),
        ("0 0 31 2 *", "day-of-month"),
        ("* * * 13 *", "month"),
        ("* * * FOO *", "month"),
        ("* * * * 8", "day-of-week"),
        ("60 * * * * *", "second"),
        ("*/0 * * * *", "minute"),
        ("9-5 * * * *", "minute"),
        ("² * * * *", "minute"),
        ("* * *", ""),
        ("* * * * * * *", ""),
        ("", ""),
        ("@reboot", ""),
        ("0 " * 200, ""),
    ],
)
def test_cron_nonsense_is_refused_by_its_part(expression: str, part: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Cron(expression)
    assert (caught.value.reason, caught.value.metadata.get("part", "")) == ("INVALID_CRON", part)
    assert caught.value.violations[0].field == "schedule.cron.expression"
    assert part in caught.value.message


def test_what_a_hostile_expression_raises_is_always_a_refusal() -> None:
    chance = random.Random(7)
    alphabet = "0159*/-,L#W? \tMONJAN@²é"
    refused = 0
    for _ in range(3000):
        text = "".join(chance.choice(alphabet) for _ in range(chance.randint(0, 24)))
        try:
            next_time(text, "Europe/Berlin", utc(2026, 1, 1))
        except InvalidArgumentError:
            refused += 1
    assert refused > 2000


@pytest.mark.parametrize(
    "name", ["Mars/Base", "../etc/passwd", "", "localtime", "America", "europe/berlin\0"]
)
def test_an_unknown_time_zone_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Cron("@daily", name)
    assert caught.value.reason == "UNKNOWN_TIME_ZONE"


def test_a_cron_that_never_comes_ends() -> None:
    assert next_time("0 0 * 2 1#5", "UTC", utc(9990, 1, 1)) is None
    assert next_time("0 0 */20 * 1L", "UTC", utc(2026, 1, 1)) is None


def test_intervals_count_from_their_anchor_in_both_directions() -> None:
    every = Timing(Every(timedelta(seconds=90), utc(2026, 1, 1)))
    assert timing.dues(every, utc(2025, 12, 31, 23, 59), limit=3) == [
        utc(2026, 1, 1),
        utc(2026, 1, 1, 0, 1, 30),
        utc(2026, 1, 1, 0, 3),
    ]
    assert timing.next_due(every, utc(2025, 12, 31, 23, 58)) == utc(2025, 12, 31, 23, 58, 30)


def test_start_and_end_bound_the_times() -> None:
    bounded = Timing(Cron("@hourly"), start=utc(2026, 1, 1, 5), end=utc(2026, 1, 1, 7))
    assert timing.dues(bounded, utc(2025, 1, 1), limit=9) == [utc(2026, 1, 1, 5), utc(2026, 1, 1, 6)]
    once = Timing(At(utc(2026, 1, 1)))
    assert timing.dues(once, utc(2025, 1, 1), limit=9) == [utc(2026, 1, 1)]
    assert timing.next_due(once, utc(2026, 1, 1)) is None


@pytest.mark.parametrize(
    "when",
    [
        Timing(Cron("*/7 * * * * *")),
        Timing(Cron("30 2 * * *", "Europe/Berlin")),
        Timing(Cron("0 0 29 2 *")),
        Timing(Every(timedelta(seconds=1.5), utc(2020, 1, 1)), end=utc(2026, 5, 1)),
        Timing(At(utc(2026, 4, 1))),
    ],
)
def test_the_latest_times_are_the_last_of_all(when: Timing) -> None:
    after, until = utc(2026, 3, 28), utc(2026, 3, 29, 12, 0, 3)
    everything = timing.dues(when, after, limit=10**6, until=until)
    assert timing.latest_dues(when, after, until, limit=5) == everything[-5:]
    assert timing.latest_due(when, after, until) == (everything[-1] if everything else None)


def test_the_latest_of_many_years_is_found_at_once() -> None:
    assert timing.latest_due(Timing(Cron("* * * * * *")), utc(1990, 1, 1), utc(2026, 1, 1)) == utc(2026, 1, 1)


def test_jitter_is_the_same_for_everybody_and_spreads() -> None:
    due, most = utc(2026, 1, 1), timedelta(minutes=10)
    offsets = [timing.fires(f"s{n}", most, due) - due for n in range(1000)]
    assert offsets == [timing.fires(f"s{n}", most, due) - due for n in range(1000)]
    assert all(timedelta() <= offset < most for offset in offsets)
    tenths = [sum(offset // MINUTE == n for offset in offsets) for n in range(10)]
    assert min(tenths) > 50
    assert len({timing.fires("s", most, due + n * MINUTE) - n * MINUTE for n in range(100)}) == 100


def test_times_rise_whatever_is_asked() -> None:
    chance = random.Random(3)
    for _ in range(200):
        expression = f"{chance.randint(0, 59)} {chance.choice(['*', '*/5', '1-3', '2'])} * * *"
        zone = chance.choice(ZONES)
        after = utc(2026, 1, 1) + timedelta(
            seconds=chance.randint(0, 365 * 86400), microseconds=chance.randint(0, 9)
        )
        found = timing.dues(Timing(Cron(expression, zone)), after, limit=5)
        assert all(earlier < later for earlier, later in pairwise([after, *found]))
