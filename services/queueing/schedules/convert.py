"""Between schedule messages and the domain; a database keeps definitions as these messages too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from google.protobuf import duration_pb2, timestamp_pb2

from plexus.queueing.v1 import schedules_pb2
from services.queueing import convert
from services.queueing.schedules.domain import Definition, MissedRuns, Run, RunState, Schedule, State
from services.queueing.schedules.timing import At, Cron, Every, Timing
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from google.protobuf import field_mask_pb2

WHEN = ("cron", "at", "every")
MUTABLE = (
    *WHEN,
    "topic",
    "message",
    "jitter",
    "missed_runs",
    "max_missed_runs",
    "start_time",
    "end_time",
    "max_firings",
    "paused",
)
_MISSED = {
    schedules_pb2.MISSED_RUNS_UNSPECIFIED: MissedRuns.ONCE,
    schedules_pb2.MISSED_RUNS_SKIP: MissedRuns.SKIP,
    schedules_pb2.MISSED_RUNS_ONCE: MissedRuns.ONCE,
    schedules_pb2.MISSED_RUNS_ALL: MissedRuns.ALL,
}
_MISSED_TO = {policy: number for number, policy in _MISSED.items()}
_MAX_MISSED_RUNS = 100
_STATES = {
    schedules_pb2.SCHEDULE_STATE_ACTIVE: State.ACTIVE,
    schedules_pb2.SCHEDULE_STATE_PAUSED: State.PAUSED,
    schedules_pb2.SCHEDULE_STATE_COMPLETED: State.COMPLETED,
}
_STATES_TO = {state: number for number, state in _STATES.items()}
_RUN_STATES_TO = {
    RunState.PENDING: schedules_pb2.RUN_STATE_PENDING,
    RunState.PUBLISHED: schedules_pb2.RUN_STATE_PUBLISHED,
    RunState.MISSED: schedules_pb2.RUN_STATE_MISSED,
    RunState.FAILED: schedules_pb2.RUN_STATE_FAILED,
}


def moment(value: timestamp_pb2.Timestamp, field: str) -> datetime:
    """A time in UTC, to the microsecond.

    Raises:
        InvalidArgumentError: It is none between the years 1 and 9999.
    """
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError("is no time between the years 1 and 9999", field=field) from error


def _span(value: duration_pb2.Duration, field: str) -> timedelta:
    try:
        return timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)
    except OverflowError as error:
        raise InvalidArgumentError("is too long", field=field) from error


def timestamp(value: datetime) -> timestamp_pb2.Timestamp:
    """The proto's time."""
    found = timestamp_pb2.Timestamp()
    found.FromDatetime(value)
    return found


def _present(value: datetime | None) -> timestamp_pb2.Timestamp | None:
    return None if value is None else timestamp(value)


def _duration(value: timedelta) -> duration_pb2.Duration:
    found = duration_pb2.Duration()
    found.FromTimedelta(value)
    return found


def state_from(number: int) -> State | None:
    """The state to look for; None is any."""
    return _STATES.get(schedules_pb2.ScheduleState.ValueType(number))


def timing_from(message: schedules_pb2.Schedule, anchor: datetime) -> Timing:
    """When a schedule fires; intervals without an anchor count from the one given.

    Raises:
        InvalidArgumentError: It does not say, or says nonsense.
    """
    times: Cron | At | Every
    match message.WhichOneof("when"):
        case "cron":
            times = Cron(message.cron.expression, message.cron.time_zone or "UTC")
        case "at":
            times = At(moment(message.at, "schedule.at"))
        case "every":
            every = message.every
            if every.HasField("anchor"):
                anchor = moment(every.anchor, "schedule.every.anchor")
            times = Every(_span(every.interval, "schedule.every.interval"), anchor)
        case _:
            raise InvalidArgumentError("needs one of cron, at and every", field="schedule")
    return Timing(
        times,
        jitter=_span(message.jitter, "schedule.jitter"),
        start=moment(message.start_time, "schedule.start_time") if message.HasField("start_time") else None,
        end=moment(message.end_time, "schedule.end_time") if message.HasField("end_time") else None,
    )


def definition_from(message: schedules_pb2.Schedule, anchor: datetime) -> Definition:
    """What a person says of a schedule; see `timing_from`."""
    return Definition(
        timing=timing_from(message, anchor),
        topic=message.topic,
        message=convert.message_from(message.message, {}, "schedule.message"),
        missed_runs=_MISSED.get(message.missed_runs, MissedRuns.ONCE),
        max_missed_runs=message.max_missed_runs or _MAX_MISSED_RUNS,
        max_firings=message.max_firings,
    )


def definition_to(definition: Definition) -> schedules_pb2.Schedule:
    """The proto's schedule as far as a person says it."""
    timing = definition.timing
    message = schedules_pb2.Schedule(
        topic=definition.topic,
        message=convert.message_to(definition.message),
        jitter=_duration(timing.jitter) if timing.jitter else None,
        missed_runs=_MISSED_TO[definition.missed_runs],
        max_missed_runs=definition.max_missed_runs,
        start_time=_present(timing.start),
        end_time=_present(timing.end),
        max_firings=definition.max_firings,
    )
    match timing.times:
        case Cron(expression, time_zone):
            message.cron.expression, message.cron.time_zone = expression, time_zone
        case At(time):
            message.at.FromDatetime(time)
        case Every(interval, anchor):
            message.every.interval.FromTimedelta(interval)
            message.every.anchor.FromDatetime(anchor)
    return message


def schedule_to(schedule: Schedule) -> schedules_pb2.Schedule:
    """The proto's schedule."""
    message = definition_to(schedule.definition)
    message.MergeFrom(
        schedules_pb2.Schedule(
            name=schedule.name,
            paused=schedule.paused,
            state=_STATES_TO[schedule.state],
            revision=schedule.revision,
            create_time=timestamp(schedule.created),
            update_time=timestamp(schedule.updated),
            next_fire_time=_present(schedule.next_fire),
            last_fire_time=_present(schedule.last_fired),
            last_error=schedule.last_error,
            firings=schedule.firings,
            missed=schedule.missed,
        )
    )
    return message


def outline_to(schedule: Schedule) -> schedules_pb2.Schedule:
    """The proto's schedule without the content of its message, of which many fit into an answer."""
    message = schedule_to(schedule)
    message.message.ClearField("data")
    return message


def run_to(run: Run) -> schedules_pb2.Run:
    """The proto's run."""
    return schedules_pb2.Run(
        number=run.number,
        due_time=timestamp(run.due),
        manual=run.manual,
        state=_RUN_STATES_TO[run.state],
        end_time=_present(run.ended),
        message_id=run.message_id,
        error=run.error,
        revision=run.revision,
    )


def merged(
    present: Schedule, wanted: schedules_pb2.Schedule, mask: field_mask_pb2.FieldMask
) -> schedules_pb2.Schedule:
    """A schedule with what a mask names, or without one what is set, taken over.

    Raises:
        InvalidArgumentError: The mask names what cannot be changed.
    """
    message = schedule_to(present)
    convert.merge(message, wanted, mask, MUTABLE)
    return message
