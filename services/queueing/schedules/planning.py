"""What a schedule does now: which of its times are published, which were missed, when the next one is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from services.queueing.schedules.domain import HISTORY, MissedRuns, Run, RunState, Schedule
from services.queueing.schedules.timing import dues, latest_dues, next_due

if TYPE_CHECKING:
    from datetime import datetime

GRACE = timedelta(minutes=1)
"""A firing later than this counts as missed: replicas take over from each other within half of it."""
COUNTED = 1000
"""Missed times of one schedule that are counted one by one."""
AT_A_TIME = 100
"""Times of one schedule that are published in one go; the next go has the others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The next step of a schedule.

    Attributes:
        schedule: As it stands afterwards.
        runs: What it does: those to be published, and the newest that were missed; in order.
    """

    schedule: Schedule
    runs: list[Run]


def plan(schedule: Schedule, now: datetime) -> Plan:
    """What a schedule does whose time has come; nothing if it has not."""
    due = _due(schedule, now)
    if not due:
        return Plan(schedule, [])
    chosen = _chosen(schedule, due, now)
    limit = schedule.definition.max_firings
    left = limit - schedule.firings if limit else len(chosen) + 1
    if left <= 0:
        return Plan(replace(schedule, next_due=None), [])
    if len(chosen) >= left:
        chosen = chosen[:left]
        due = [each for each in due if each <= chosen[-1]]  # nothing is missed after its end
    now_published, rest = chosen[:AT_A_TIME], chosen[AT_A_TIME:]
    kept = set(chosen)
    missed = [each for each in due if each not in kept]
    firings = schedule.firings + len(now_published)
    done = limit and firings >= limit
    following = rest[0] if rest else next_due(schedule.definition.timing, due[-1])
    rows = sorted([*now_published, *missed[-HISTORY:]])
    published = set(now_published)
    runs = [
        Run(
            number=schedule.runs + position,
            due=each,
            state=RunState.PENDING if each in published else RunState.MISSED,
            revision=schedule.revision,
            ended=None if each in published else now,
        )
        for position, each in enumerate(rows, 1)
    ]
    after = replace(
        schedule,
        next_due=None if done else following,
        firings=firings,
        missed=schedule.missed + len(missed),
        runs=schedule.runs + len(runs),
    )
    return Plan(after, runs)


def _due(schedule: Schedule, now: datetime) -> list[datetime]:
    """Its times that have come, oldest first; of a great many the newest."""
    if schedule.paused or schedule.next_due is None or schedule.fires(schedule.next_due) > now:
        return []
    timing = schedule.definition.timing
    found = [schedule.next_due, *dues(timing, schedule.next_due, limit=COUNTED, until=now)]
    if len(found) > COUNTED:
        found = latest_dues(timing, schedule.next_due, now, limit=COUNTED)
    while found and schedule.fires(found[-1]) > now:
        found.pop()
    return found or [schedule.next_due]


def _chosen(schedule: Schedule, due: list[datetime], now: datetime) -> list[datetime]:
    """Which times are published: all that are on time, and of the others what the schedule says."""
    late = [each for each in due if now - schedule.fires(each) > GRACE]
    if not late:
        return due
    on_time = [each for each in due if now - schedule.fires(each) <= GRACE]
    match schedule.definition.missed_runs:
        case MissedRuns.SKIP:
            return on_time
        case MissedRuns.ONCE:
            return due[-1:]
        case MissedRuns.ALL:
            return [*late[-schedule.definition.max_missed_runs :], *on_time]


def superseded(schedule: Schedule, run: Run, now: datetime) -> bool:
    """Whether a run that an outage kept from being published is now missed rather than made up."""
    if run.manual or now - schedule.fires(run.due) <= GRACE:
        return False
    match schedule.definition.missed_runs:
        case MissedRuns.SKIP:
            return True
        case MissedRuns.ONCE:
            newer = schedule.runs > run.number  # written down already
            return newer or (schedule.next_fire is not None and schedule.next_fire <= now)
        case MissedRuns.ALL:
            return False
