"""What schedules do when their time has come, or long gone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.queueing.domain import MAX_DATA_BYTES, Message
from services.queueing.schedules import domain
from services.queueing.schedules.domain import Definition, MissedRuns, RunState, Schedule, State
from services.queueing.schedules.planning import AT_A_TIME, COUNTED, Plan, plan, superseded
from services.queueing.schedules.timing import At, Cron, Every, Timing
from services.runtime.errors import InvalidArgumentError

SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
START = datetime(2026, 6, 1, tzinfo=UTC)
MINUTELY = Timing(Every(MINUTE, START))


def schedule(timing: Timing = MINUTELY, **settings: object) -> Schedule:
    definition = replace(Definition(timing, "jobs", Message(b"x")), **settings)  # type: ignore[arg-type]  # a test's
    return Schedule("s", "uid", definition, START, START).from_now(START)


def published(step: Plan) -> list[datetime]:
    return [run.due for run in step.runs if run.state is RunState.PENDING]


def test_nothing_happens_before_its_time() -> None:
    waiting = schedule()
    assert waiting.next_due == START + MINUTE
    assert plan(waiting, START + MINUTE - SECOND) == Plan(waiting, [])


def test_a_firing_on_time_is_published_and_the_next_one_set() -> None:
    step = plan(schedule(), START + MINUTE)
    assert published(step) == [START + MINUTE]
    assert (step.schedule.next_due, step.schedule.firings, step.schedule.missed) == (START + 2 * MINUTE, 1, 0)


def test_firings_of_the_last_moments_are_all_published() -> None:
    step = plan(schedule(Timing(Every(SECOND, START)), missed_runs=MissedRuns.SKIP), START + 30 * SECOND)
    assert published(step) == [START + n * SECOND for n in range(1, 31)]


@pytest.mark.parametrize(
    ("policy", "expected", "missed"),
    [
        (MissedRuns.SKIP, [59, 60], 58),
        (MissedRuns.ONCE, [60], 59),
        (MissedRuns.ALL, [*range(50, 60), 60], 49),
    ],
)
def test_missed_firings_follow_the_policy(policy: MissedRuns, expected: list[int], missed: int) -> None:
    late = schedule(missed_runs=policy, max_missed_runs=9)
    step = plan(late, START + HOUR)
    assert published(step) == [START + n * MINUTE for n in expected]
    assert (step.schedule.missed, step.schedule.firings) == (missed, len(expected))
    assert step.schedule.next_due == START + 61 * MINUTE
    assert [run.number for run in step.runs] == list(range(1, len(step.runs) + 1))
    assert sum(run.state is RunState.MISSED for run in step.runs) == missed


def test_an_outage_of_years_is_planned_at_once_and_counted_up_to_a_bound() -> None:
    for policy in MissedRuns:
        late = schedule(Timing(Cron("* * * * * *")), missed_runs=policy, max_missed_runs=300)
        now = START + timedelta(days=4000)
        step = plan(late, now)
        assert step.schedule.missed + step.schedule.firings <= COUNTED + AT_A_TIME
        assert len(step.runs) <= AT_A_TIME + domain.HISTORY
        assert published(step)[-1:] == [now] or policy is MissedRuns.ALL
        assert step.schedule.missed > 0


def test_many_that_are_made_up_come_in_several_goes_and_are_counted_once() -> None:
    now = START + timedelta(days=1)
    step = plan(schedule(missed_runs=MissedRuns.ALL, max_missed_runs=250), now)
    found = published(step)
    missed = step.schedule.missed
    while step.schedule.next_due and step.schedule.next_due <= now:
        assert len(published(step)) <= AT_A_TIME
        step = plan(step.schedule, now)
        found += published(step)
    assert len(found) == len(set(found)) == step.schedule.firings == 252  # two of them are not late
    assert (found, step.schedule.missed) == (sorted(found), missed)


def test_it_is_done_after_its_last_firing() -> None:
    for policy, minute in ((MissedRuns.SKIP, 59), (MissedRuns.ONCE, 60), (MissedRuns.ALL, 1)):
        step = plan(schedule(missed_runs=policy, max_firings=1), START + HOUR)
        assert published(step) == [START + minute * MINUTE]
        assert step.schedule.missed == minute - 1
        assert (step.schedule.next_due, step.schedule.state) == (None, State.COMPLETED)
        assert step.schedule.from_now(START + HOUR).next_due is None
    several = plan(schedule(Timing(Every(SECOND, START)), max_firings=3), START + 20 * SECOND)
    assert published(several) == [START + n * SECOND for n in (1, 2, 3)]
    assert (several.schedule.missed, several.schedule.state) == (0, State.COMPLETED)
    many = schedule(missed_runs=MissedRuns.ALL, max_missed_runs=1000, max_firings=AT_A_TIME + 5)
    first = plan(many, START + 1000 * MINUTE)
    assert (len(published(first)), first.schedule.state) == (AT_A_TIME, State.ACTIVE)
    second = plan(first.schedule, START + 1000 * MINUTE)
    assert (len(published(second)), second.schedule.state) == (5, State.COMPLETED)
    once = plan(schedule(Timing(At(START + SECOND))), START + SECOND)
    assert (published(once), once.schedule.state) == ([START + SECOND], State.COMPLETED)


def test_a_single_time_that_was_missed_is_made_up_unless_it_is_to_be_skipped() -> None:
    late = schedule(Timing(At(START + SECOND)))
    assert published(plan(late, START + HOUR)) == [START + SECOND]
    skipping = schedule(Timing(At(START + SECOND)), missed_runs=MissedRuns.SKIP)
    step = plan(skipping, START + HOUR)
    assert (published(step), step.schedule.missed, step.schedule.state) == ([], 1, State.COMPLETED)


def test_no_firing_comes_before_its_jitter() -> None:
    spread = schedule(Timing(Every(HOUR, START), jitter=50 * MINUTE))
    assert spread.next_due is not None
    fires = spread.fires(spread.next_due)
    assert spread.next_due < fires < spread.next_due + 50 * MINUTE
    assert plan(spread, fires - timedelta(microseconds=1)).runs == []
    assert published(plan(spread, fires)) == [spread.next_due]


def test_a_clock_set_back_repeats_nothing() -> None:
    step = plan(schedule(), START + HOUR)
    assert plan(step.schedule, START + 30 * MINUTE).runs == []


def test_pausing_leaves_out_and_resuming_begins_from_now() -> None:
    paused = replace(schedule(), paused=True)
    assert plan(paused, START + HOUR).runs == []
    assert paused.from_now(START + HOUR).next_due is None
    resumed = replace(paused, paused=False).from_now(START + HOUR)
    assert resumed.next_due == START + 61 * MINUTE


def test_what_an_outage_held_up_is_missed_when_a_newer_one_stands_for_it() -> None:
    for policy, missed in ((MissedRuns.SKIP, True), (MissedRuns.ONCE, True), (MissedRuns.ALL, False)):
        step = plan(schedule(missed_runs=policy), START + MINUTE)
        (run,) = step.runs
        assert not superseded(step.schedule, run, START + 90 * SECOND)
        assert superseded(step.schedule, run, START + 10 * MINUTE) is missed
    first = plan(schedule(), START + MINUTE)
    newer = plan(first.schedule, START + HOUR).schedule
    assert superseded(newer, first.runs[0], START + HOUR)  # though nothing else is due
    alone = plan(schedule(Timing(At(START + SECOND))), START + SECOND)
    assert not superseded(alone.schedule, alone.runs[0], START + HOUR)


@pytest.mark.parametrize(
    ("timing", "field", "reason"),
    [
        (Timing(Every(timedelta(seconds=0.5), START)), "schedule.every.interval", "INTERVAL_TOO_SHORT"),
        (Timing(Every(timedelta(), START)), "schedule.every.interval", "INTERVAL_TOO_SHORT"),
        (Timing(Every(timedelta(days=367), START)), "schedule.every.interval", "INTERVAL_TOO_LONG"),
        (Timing(Cron("@daily"), start=START, end=START), "schedule.end_time", "END_BEFORE_START"),
        (Timing(Cron("@daily"), jitter=timedelta(days=2)), "schedule.jitter", "INVALID_ARGUMENT"),
        (Timing(Cron("@hourly"), jitter=HOUR), "schedule.jitter", "INVALID_ARGUMENT"),
        (Timing(Every(MINUTE, START), jitter=MINUTE), "schedule.jitter", "INVALID_ARGUMENT"),
    ],
)
def test_impossible_timings_are_refused(timing: Timing, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        domain.check("s", Definition(timing, "jobs", Message(b"")), shortest=SECOND)
    assert (caught.value.violations[0].field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize(
    ("timing", "field", "reason"),
    [
        (Timing(At(START - SECOND)), "schedule.at", "AT_IN_PAST"),
        (Timing(At(START)), "schedule.at", "AT_IN_PAST"),
        (Timing(At(START + HOUR), end=START + MINUTE), "schedule.end_time", "NEVER_FIRES"),
        (Timing(Cron("@daily"), end=START), "schedule.end_time", "NEVER_FIRES"),
        (Timing(Cron("0 0 */20 * 1L")), "schedule.cron.expression", "NEVER_FIRES"),
    ],
)
def test_what_would_never_fire_is_refused(timing: Timing, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        domain.check_fires(timing, START)
    assert (caught.value.violations[0].field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"topic": "no topic"}, "schedule.topic"),
        ({"max_missed_runs": 0}, "schedule.max_missed_runs"),
        ({"max_missed_runs": 1001}, "schedule.max_missed_runs"),
        ({"max_firings": -1}, "schedule.max_firings"),
        ({"message": Message(b"", dedup_id="mine")}, "schedule.message.dedup_id"),
        ({"message": Message(b"x" * (domain.MAX_DATA_BYTES + 1))}, "schedule.message.data"),
        ({"message": Message(b"", delay_s=-1)}, "schedule.message.delay"),
        ({"message": Message(b"", {str(n): "" for n in range(63)})}, "schedule.message.attributes"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, object], field: str) -> None:
    assert domain.MAX_DATA_BYTES < MAX_DATA_BYTES
    definition = replace(schedule().definition, **settings)  # type: ignore[arg-type]  # a test's
    with pytest.raises(InvalidArgumentError) as caught:
        domain.check("s", definition, shortest=SECOND)
    assert caught.value.violations[0].field == field


def test_a_firing_has_one_identity_and_says_what_it_is() -> None:
    (run,) = plan(schedule(), START + MINUTE).runs
    firing = domain.Firing("uid", "s", run.due, run, "jobs", Message(b"x", {"k": "v"}))
    message = firing.published_as()
    assert message.attributes == {
        "k": "v",
        "plexus-schedule": "s",
        "plexus-schedule-due": "2026-06-01T00:01:00Z",
    }
    assert message.dedup_id == firing.published_as().dedup_id
    assert message.dedup_id != replace(firing, run=replace(run, number=2)).published_as().dedup_id
