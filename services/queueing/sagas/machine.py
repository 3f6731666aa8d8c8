"""How a saga changes: (saga, event) to (saga, history), without input or output.

What is to be done in the world follows from the saga alone: an attempt without a deadline is to be sent. So
whoever takes a saga over knows what to do, and does again what may have been done before, under the same call
id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.queueing.sagas.domain import (
    MAX_ERROR,
    Attempt,
    Cause,
    Kind,
    Problem,
    Record,
    Saga,
    State,
    StepRun,
    StepState,
)
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from services.queueing.sagas.definitions import Definition

TIMED_OUT = "DEADLINE_EXCEEDED"
NOTHING_THERE = "NOT_FOUND"
MAX_OVERDUE = 100
NO_PROBLEM = Problem()
REFUSALS = frozenset(
    {
        "INVALID_ARGUMENT",
        NOTHING_THERE,
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
    }
)
"""Errors that say that nothing was done and that trying again does not help."""
_HOPELESS = REFUSALS | {"DATA_LOSS"}
_UNDONE = REFUSALS | {"RESOURCE_EXHAUSTED", "ABORTED"}


@dataclass(frozen=True, slots=True)
class Transition:
    """A saga after an event, and what is to be written in its history; the same saga if nothing changed."""

    saga: Saga
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Sent:
    """An attempt's request is with the broker."""

    call_id: str


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A call was answered with a result, a JSON value."""

    call_id: str
    result: Any = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A call was answered with an error; `untouched` if nothing can have been done, whatever the error."""

    call_id: str
    problem: Problem
    untouched: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Somebody wants it undone."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Somebody looked at a stuck saga: the compensation is tried anew, or was done by hand."""

    skip: bool = False


Event = Sent | Succeeded | Failed | Tick | Cancel | Resume


def begin(
    definition: Definition, saga_id: str, input_: dict[str, Any], secret: str, now: float, trace: str = ""
) -> Transition:
    """A new saga, about to do its first step.

    Args:
        definition: What it runs.
        saga_id: Its id.
        input_: What every step gets, a JSON object.
        secret: Part of its call ids.
        now: Seconds since 1970.
        trace: W3C trace context of whoever starts it.
    """
    saga = Saga(
        id=saga_id,
        definition=definition.name,
        version=definition.version,
        input=input_,
        steps=tuple(StepRun(step.name) for step in definition.steps),
        secret=secret,
        trace=trace,
        created=now,
    )
    change = _Change(definition, saga, now)
    change.note(Kind.STARTED, whole=True)
    change.attempt()
    return change.done()


def apply(definition: Definition, saga: Saga, event: Event, now: float) -> Transition:
    """What an event makes of a saga; one that means nothing to it changes nothing.

    Args:
        definition: What the saga runs, in its version.
        saga: As it is.
        event: What happened.
        now: Seconds since 1970.

    Raises:
        FailedPreconditionError: Cancel of a saga that has ended or is stuck, Resume of one that is not stuck.
    """
    change = _Change(definition, saga, now)
    if isinstance(event, Cancel):
        change.cancel()
    elif isinstance(event, Resume):
        change.resume(skip=event.skip)
    elif isinstance(event, Tick):
        change.tick()
    elif saga.attempt is None or event.call_id != saga.attempt.call_id:
        if not isinstance(event, Sent):
            change.late(event)
    elif isinstance(event, Sent):
        change.sent()
    elif isinstance(event, Succeeded):
        change.succeeded(event.result)
    else:
        change.failed(event)
    return change.done()


class _Change:
    """A saga while it changes."""

    def __init__(self, definition: Definition, saga: Saga, now: float) -> None:
        self._definition = definition
        self._before = saga
        self._saga = saga
        self._now = now
        self._records: list[Record] = []

    def done(self) -> Transition:
        if self._saga is self._before:
            return Transition(self._saga)
        return Transition(replace(self._saga, updated=self._now), tuple(self._records))

    def note(
        self,
        kind: Kind,
        *,
        whole: bool = False,
        problem: Problem = NO_PROBLEM,
        attempt: Attempt | None = None,
    ) -> None:
        """Write into the history, of the saga as a whole or of its step."""
        saga = self._saga = replace(self._saga, revision=self._saga.revision + 1)
        record = Record(saga.revision, self._now, kind, saga.state, problem=problem)
        if not whole:
            record = replace(record, step=self._step.name, undo=saga.undoing)
        if attempt is not None:
            record = replace(record, attempt=attempt.number, took_s=self._now - attempt.started)
        self._records.append(record)

    @property
    def _step(self) -> StepRun:
        return self._saga.steps[self._saga.position]

    def _set(self, **changes: Any) -> None:
        self._saga = replace(self._saga, **changes)

    def _set_step(self, **changes: Any) -> None:
        saga = self._saga
        steps = list(saga.steps)
        steps[saga.position] = replace(self._step, **changes)
        self._set(steps=tuple(steps))

    def attempt(self) -> None:
        """Begin the next attempt of the action, or compensation, at the position."""
        saga = self._saga
        if saga.undoing:
            number = self._step.undo_attempts + 1
            self._set_step(state=StepState.COMPENSATING, undo_attempts=number)
        else:
            number = self._step.attempts + 1
            self._set_step(state=StepState.RUNNING, attempts=number)
        phase = "c" if saga.undoing else "a"
        call_id = f"{saga.id}.{saga.position}{phase}{number}.{saga.secret}"
        attempt = Attempt(call_id, number, self._now)
        self._set(attempt=attempt, tries=saga.tries + 1, pause_until=0.0)
        self.note(Kind.ATTEMPT_STARTED, attempt=attempt)

    def sent(self) -> None:
        attempt = self._saga.attempt
        if attempt is not None and not attempt.deadline:
            timeout_s = self._saga.action_of(self._definition).timeout_s
            self._set(attempt=replace(attempt, deadline=self._now + timeout_s))

    def succeeded(self, result: Any, problem: Problem = NO_PROBLEM) -> None:
        ended = self._end_attempt()
        if self._saga.undoing:
            self._set_step(state=StepState.COMPENSATED)
            self.note(Kind.ATTEMPT_SUCCEEDED, problem=problem, attempt=ended)
            self._undo_from(self._saga.position - 1)
            return
        self._set_step(state=StepState.SUCCEEDED, done=True, result=result, problem=NO_PROBLEM)
        self.note(Kind.ATTEMPT_SUCCEEDED, attempt=ended)
        if self._saga.cause is Cause.CANCELLED:
            self._begin_undoing()
        elif self._saga.position + 1 < len(self._saga.steps):
            self._set(position=self._saga.position + 1, tries=0)
            self.attempt()
        else:
            self._end(State.SUCCEEDED)

    def failed(self, event: Failed) -> None:
        problem = Problem(event.problem.code, event.problem.text[:MAX_ERROR])
        if self._saga.undoing and problem.code == NOTHING_THERE:
            self.succeeded(None, problem)
            return
        ended = self._end_attempt()
        doubtful = not event.untouched and problem.code not in _UNDONE
        if doubtful and not self._saga.undoing:
            self._set_step(doubtful=True)
        self._set_step(problem=problem)
        self.note(Kind.ATTEMPT_FAILED, problem=problem, attempt=ended)
        self._again_or_not(problem, Cause.FAILED)

    def tick(self) -> None:
        saga = self._saga
        if saga.attempt is not None and 0 < saga.attempt.deadline <= self._now:
            overdue = (*saga.overdue, saga.attempt.call_id)[-MAX_OVERDUE:]
            ended = self._end_attempt()
            problem = Problem(TIMED_OUT, "no answer in time")
            self._set(overdue=overdue)
            self._set_step(doubtful=self._step.doubtful or not saga.undoing, problem=problem)
            self.note(Kind.ATTEMPT_TIMED_OUT, problem=problem, attempt=ended)
            self._again_or_not(problem, Cause.TIMED_OUT)
        elif 0 < saga.pause_until <= self._now:
            self.attempt()

    def late(self, event: Succeeded | Failed) -> None:
        """Record an answer that nobody waits for any more; one that was counted before is no news."""
        saga = self._saga
        if event.call_id not in saga.overdue:
            return
        self._set(overdue=tuple(call for call in saga.overdue if call != event.call_id))
        index, phase, number = _parts(event.call_id)
        saga = self._saga = replace(self._saga, revision=saga.revision + 1)
        self._records.append(
            Record(
                saga.revision,
                self._now,
                Kind.LATE_REPLY,
                saga.state,
                step=saga.steps[index].name,
                undo=phase == "c",
                attempt=number,
                problem=event.problem if isinstance(event, Failed) else NO_PROBLEM,
            )
        )

    def cancel(self) -> None:
        saga = self._saga
        if saga.state.ended:
            raise _refused(saga, f"has ended: {saga.state}", "SAGA_ENDED")
        if saga.state is State.STUCK:
            raise _refused(saga, "is stuck: retry it", "SAGA_STUCK")
        if saga.undoing or saga.cause is Cause.CANCELLED:
            return
        self._set(cause=Cause.CANCELLED)
        self.note(Kind.CANCELLED, whole=True)
        if saga.attempt is None:  # it waits to try again
            self._set(pause_until=0.0)
            self._set_step(state=self._after_failure)
            self._begin_undoing()

    def resume(self, *, skip: bool) -> None:
        saga = self._saga
        if saga.state is not State.STUCK:
            raise _refused(saga, "is not stuck", "SAGA_NOT_STUCK")
        self._set(state=State.COMPENSATING, problem=NO_PROBLEM, tries=0)
        self.note(Kind.RETRIED, whole=True)
        if skip:
            self._set_step(state=StepState.SKIPPED)
            self._undo_from(saga.position - 1)
        else:
            self.attempt()

    def _end_attempt(self) -> Attempt | None:
        ended = self._saga.attempt
        self._set(attempt=None)
        return ended

    @property
    def _after_failure(self) -> StepState:
        return StepState.UNCERTAIN if self._step.doubtful else StepState.FAILED

    def _again_or_not(self, problem: Problem, cause: Cause) -> None:
        """After a failure: pause and try again, or give up."""
        saga = self._saga
        retry = saga.action_of(self._definition).retry
        hopeless = problem.code in _HOPELESS or saga.tries >= retry.max_attempts
        if not hopeless and (saga.undoing or saga.cause is Cause.NONE):
            pause_s = retry.pause_s(saga.tries)
            if pause_s:
                self._set(pause_until=self._now + pause_s)
            else:
                self.attempt()
        elif saga.undoing:
            self._set_step(state=StepState.STUCK)
            self._set(state=State.STUCK, problem=problem)
            self.note(Kind.STUCK, problem=problem)
        else:
            self._set_step(state=self._after_failure)
            if saga.cause is Cause.NONE:
                self._set(cause=cause, problem=problem)
            self._begin_undoing()

    def _begin_undoing(self) -> None:
        self._set(state=State.COMPENSATING)
        self.note(Kind.COMPENSATION_STARTED, whole=True, problem=self._saga.problem)
        self._undo_from(self._saga.position)

    def _undo_from(self, position: int) -> None:
        """Undo the last step at or before a position that needs it, or be done."""
        steps = self._definition.steps
        for index in range(position, -1, -1):
            if steps[index].compensation is not None and self._saga.steps[index].may_have_run:
                self._set(position=index, tries=0)
                self.attempt()
                return
        self._end(State.COMPENSATED)

    def _end(self, state: State) -> None:
        self._set(state=state, ended=self._now)
        self.note(Kind(state.value), whole=True, problem=self._saga.problem)


def _parts(call_id: str) -> tuple[int, str, int]:
    """Step, phase and number of a call id."""
    middle = call_id.split(".")[1]
    phase = "c" if "c" in middle else "a"
    index, _, number = middle.partition(phase)
    return int(index), phase, int(number)


def _refused(saga: Saga, why: str, reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"saga {saga.id!r} {why}", reason=reason, metadata={"saga": saga.id, "state": saga.state.value}
    )
