"""Sagas that run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from services.runtime.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from services.queueing.sagas.definitions import Action, Definition

MAX_INPUT_BYTES = 256 * 1024
MAX_RESULT_BYTES = 64 * 1024
MAX_ERROR = 1000
MAX_EVENTS = 1000
MAX_VERSIONS = 100
MAX_REQUEST_ID = 128
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class State(StrEnum):
    """Where a saga stands."""

    RUNNING = "running"
    COMPENSATING = "compensating"
    SUCCEEDED = "succeeded"
    COMPENSATED = "compensated"
    STUCK = "stuck"

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self in {State.SUCCEEDED, State.COMPENSATED}


class Cause(StrEnum):
    """Why a saga is undone."""

    NONE = ""
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class StepState(StrEnum):
    """Where a step stands; `uncertain` is one that failed and may have been done all the same."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    COMPENSATING = "compensating"
    COMPENSATED = "compensated"
    STUCK = "stuck"
    SKIPPED = "skipped"


class Kind(StrEnum):
    """What happened to a saga."""

    STARTED = "started"
    ATTEMPT_STARTED = "attempt_started"
    ATTEMPT_SUCCEEDED = "attempt_succeeded"
    ATTEMPT_FAILED = "attempt_failed"
    ATTEMPT_TIMED_OUT = "attempt_timed_out"
    LATE_REPLY = "late_reply"
    CANCELLED = "cancelled"
    COMPENSATION_STARTED = "compensation_started"
    STUCK = "stuck"
    RETRIED = "retried"
    SUCCEEDED = "succeeded"
    COMPENSATED = "compensated"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error: the gRPC code's name and its text."""

    code: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class StepRun:
    """A step of a saga.

    Attributes:
        name: Of the step.
        state: Where it stands.
        attempts: How often the action was tried.
        undo_attempts: How often the compensation was tried.
        done: Whether the action was answered with a result.
        result: That result, a JSON value.
        doubtful: Whether an attempt failed that may have done something all the same.
        problem: Its last error.
    """

    name: str
    state: StepState = StepState.PENDING
    attempts: int = 0
    undo_attempts: int = 0
    done: bool = False
    result: Any = None
    doubtful: bool = False
    problem: Problem = Problem()

    @property
    def may_have_run(self) -> bool:
        """Whether there may be something to undo."""
        return self.done or self.doubtful


@dataclass(frozen=True, slots=True)
class Attempt:
    """The one attempt of a saga that is under way.

    Attributes:
        call_id: Names it in requests and replies.
        number: Of the attempts of this action, from 1.
        started: When it began, seconds since 1970.
        deadline: When it counts as failed, seconds since 1970; 0 while it is not known to have been sent.
    """

    call_id: str
    number: int
    started: float
    deadline: float = 0.0


@dataclass(frozen=True, slots=True)
class Saga:
    """A run of a definition; times are seconds since 1970.

    Attributes:
        id: Its id.
        definition: Name of the definition.
        version: Of the definition.
        input: What it was started with, a JSON object.
        steps: In the order of the definition.
        secret: Makes its call ids hard to guess.
        trace: W3C trace context of whoever started it.
        state: Where it stands.
        cause: Why it is undone; set while it still runs, it waits for its attempt to end.
        problem: What made it fail, or stuck.
        position: The step that is being done or undone.
        tries: Attempts of this action since it was begun, or told to go on.
        attempt: The one under way.
        pause_until: When the next attempt begins; 0 without a pause.
        overdue: Calls that timed out and were not answered yet, the newest 100.
        revision: Rises with each event.
        created: When it was started.
        updated: When it last changed.
        ended: When it ended; 0 before.
    """

    id: str
    definition: str
    version: int
    input: dict[str, Any]
    steps: tuple[StepRun, ...]
    secret: str = ""
    trace: str = ""
    state: State = State.RUNNING
    cause: Cause = Cause.NONE
    problem: Problem = Problem()
    position: int = 0
    tries: int = 0
    attempt: Attempt | None = None
    pause_until: float = 0.0
    overdue: tuple[str, ...] = ()
    revision: int = 0
    created: float = 0.0
    updated: float = 0.0
    ended: float = 0.0

    @property
    def undoing(self) -> bool:
        """Whether what is under way, or stuck, is a compensation."""
        return self.state is not State.RUNNING

    @property
    def due(self) -> float | None:
        """When it needs its driver, 0 for at once; None if nothing will happen by itself."""
        if self.attempt is not None:
            return self.attempt.deadline
        return self.pause_until or None

    @property
    def results(self) -> dict[str, Any]:
        """What the steps that were done answered."""
        return {step.name: step.result for step in self.steps if step.done}

    def action_of(self, definition: Definition) -> Action:
        """The action that is under way."""
        step = definition.steps[self.position]
        action = step.compensation if self.undoing else step.action
        if action is None:
            raise ValueError(f"step {step.name!r} has no compensation")
        return action


@dataclass(frozen=True, slots=True)
class Record:
    """An entry of a saga's history; `revision`, `time` and `state` are the saga's from then on.

    `took_s` is how long an attempt that has ended took.
    """

    revision: int
    time: float
    kind: Kind
    state: State
    step: str = ""
    undo: bool = False
    attempt: int = 0
    problem: Problem = Problem()
    took_s: float = 0.0


def check_id(saga_id: str) -> str:
    """Return a valid id.

    Raises:
        InvalidArgumentError: It is not one.
    """
    if not _ID.fullmatch(saga_id):
        raise InvalidArgumentError("must be 1 to 64 letters, digits, hyphens and underscores", field="id")
    return saga_id


def saga_of(call_id: str) -> str:
    """The id of the saga that a call belongs to; empty if it is none of ours."""
    saga_id = call_id.partition(".")[0]
    return saga_id if _ID.fullmatch(saga_id) else ""


def no_saga(saga_id: str) -> NotFoundError:
    """The error for an unknown saga."""
    return NotFoundError(f"no saga {saga_id!r}", reason="SAGA_NOT_FOUND", metadata={"saga": saga_id})


def no_definition(name: str, version: int = 0) -> NotFoundError:
    """The error for an unknown definition, or version of it."""
    which = f"{name!r} version {version}" if version else repr(name)
    return NotFoundError(
        f"no saga definition {which}", reason="SAGA_DEFINITION_NOT_FOUND", metadata={"definition": name}
    )
