"""The state machine of sagas: what each event does in each state, and what holds in every state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.resources import Backoff, RetryPolicy
from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.domain import Cause, Kind, Problem, Saga, State, StepState, saga_of
from services.queueing.sagas.machine import (
    Cancel,
    Event,
    Failed,
    Resume,
    Sent,
    Succeeded,
    Tick,
    Transition,
    apply,
    begin,
)
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENT = RetryPolicy(Backoff.FIXED, 5.0, 5.0, max_attempts=2)
AT_ONCE = RetryPolicy(Backoff.IMMEDIATE, max_attempts=2)
DEFINITION = Definition(
    "order",
    (
        Step("reserve", Action("reserve", retry=PATIENT), Action("release", retry=PATIENT)),
        Step("inform", Action("inform", retry=AT_ONCE)),
        Step("charge", Action("charge", retry=PATIENT), Action("refund", retry=AT_ONCE)),
    ),
    version=3,
)
AWAY, REFUSED = Problem("UNAVAILABLE", "away"), Problem("FAILED_PRECONDITION", "sold out")


class Run:
    """A saga with a clock, and its history."""

    def __init__(self, definition: Definition = DEFINITION) -> None:
        self.definition = definition
        self.now = 1000.0
        first = begin(definition, "s1", {"sku": 7}, "secret", self.now)
        self.saga, self.records = first.saga, list(first.records)

    def __call__(self, event: Event, *, after_s: float = 0.0) -> Saga:
        self.now += after_s
        made = apply(self.definition, self.saga, event, self.now)
        self.saga = made.saga
        self.records += made.records
        return self.saga

    @property
    def call(self) -> str:
        assert self.saga.attempt is not None
        return self.saga.attempt.call_id

    def answer(self, result: object = None) -> Saga:
        self(Sent(self.call))
        return self(Succeeded(self.call, result))

    def fail(self, problem: Problem) -> Saga:
        return self(Failed(self.call, problem))

    @property
    def kinds(self) -> list[str]:
        return [f"{record.step}{'!' if record.undo else ''} {record.kind}".strip() for record in self.records]


def test_steps_are_done_in_order_and_their_results_kept() -> None:
    run = Run()
    for result in ({"id": 1}, None, "paid"):
        saga = run.answer(result)
    assert saga.state is State.SUCCEEDED
    assert saga.results == {"reserve": {"id": 1}, "inform": None, "charge": "paid"}
    assert (saga.due, saga.ended, saga.version) == (None, 1000.0, 3)
    attempts = ["reserve", "inform", "charge"]
    expected = [f"{step} attempt_{what}" for step in attempts for what in ("started", "succeeded")]
    assert run.kinds == ["started", *expected, "succeeded"]


def test_an_attempt_is_to_be_sent_until_it_was_and_then_has_its_time() -> None:
    run = Run()
    assert run.saga.due == 0.0
    saga = run(Sent(run.call), after_s=2)
    assert saga.due == 1002.0 + DEFINITION.steps[0].action.timeout_s
    assert run(Sent(run.call), after_s=9) is saga  # sent again by who took it over: no more time


def test_a_failed_attempt_is_repeated_after_a_pause_under_another_call_id() -> None:
    run = Run()
    first = run.call
    saga = run.fail(AWAY)
    assert (saga.attempt, saga.due) == (None, run.now + 5)
    assert run(Tick(), after_s=4) is saga
    run(Tick(), after_s=1)
    assert run.call != first
    assert saga_of(run.call) == "s1"
    assert run.saga.steps[0].attempts == 2


def test_what_was_done_is_undone_the_last_first() -> None:
    run = Run()
    run.answer({"id": 1})
    run.answer()
    saga = run.fail(REFUSED)
    assert (saga.state, saga.cause, saga.problem) == (State.COMPENSATING, Cause.FAILED, REFUSED)
    assert saga.position == 0  # a refused charge needs no refund, informing has nothing to undo
    saga = run.answer()
    assert saga.state is State.COMPENSATED
    states = [step.state for step in saga.steps]
    assert states == [StepState.COMPENSATED, StepState.SUCCEEDED, StepState.FAILED]


def test_a_refusal_is_not_repeated() -> None:
    run = Run()
    saga = run.fail(REFUSED)
    assert (saga.state, saga.steps[0].attempts, saga.steps[0].state) == (
        State.COMPENSATED,
        1,
        StepState.FAILED,
    )


@pytest.mark.parametrize(
    ("code", "untouched", "undone"),
    [
        ("UNKNOWN", False, True),
        ("UNAVAILABLE", False, True),
        ("ABORTED", False, False),
        ("UNKNOWN", True, False),
    ],
)
def test_a_step_that_may_have_run_is_undone_too(code: str, untouched: bool, undone: bool) -> None:
    run = Run()
    for _ in range(2):
        run(Failed(run.call, Problem(code), untouched))
        run(Tick(), after_s=5)
    if undone:
        assert (run.saga.state, run.saga.steps[0].state) == (State.COMPENSATING, StepState.COMPENSATING)
    else:
        assert run.saga.state is State.COMPENSATED


def test_a_step_that_timed_out_is_undone_and_its_late_answer_recorded_once() -> None:
    run = Run()
    late = []
    for _ in range(2):
        run(Sent(run.call))
        late.append(run.call)
        run(Tick(), after_s=30)
        run(Tick(), after_s=5)
    assert (run.saga.state, run.saga.cause) == (State.COMPENSATING, Cause.TIMED_OUT)
    saga = run(Succeeded(late[0], "after all"))
    assert saga.state is State.COMPENSATING
    assert saga.results == {}
    assert run.records[-1].kind is Kind.LATE_REPLY
    assert (run.records[-1].step, run.records[-1].attempt, run.records[-1].undo) == ("reserve", 1, False)
    assert run(Succeeded(late[0], "after all")) is saga
    run.answer()
    assert run.saga.state is State.COMPENSATED
    run(Failed(late[1], AWAY))
    assert run.records[-1].kind is Kind.LATE_REPLY
    assert run.saga.state is State.COMPENSATED


def test_a_compensation_is_repeated_then_stuck_then_goes_on() -> None:
    run = Run()
    run.answer()
    run.answer()
    run(Sent(run.call))
    run(Tick(), after_s=30)
    run(Tick(), after_s=5)
    run(Sent(run.call))
    run(Tick(), after_s=30)
    for _ in range(2):
        run.fail(AWAY)
    saga = run.saga
    assert (saga.state, saga.due, saga.steps[2].state) == (State.STUCK, None, StepState.STUCK)
    assert saga.problem == AWAY
    saga = run(Resume())
    assert (saga.state, saga.steps[2].undo_attempts, saga.problem) == (State.COMPENSATING, 3, Problem())
    run.answer()
    run.answer()
    assert run.saga.state is State.COMPENSATED


def test_a_stuck_compensation_that_was_done_by_hand_is_left_out() -> None:
    run = Run()
    run.answer()
    run.fail(REFUSED)
    run.fail(REFUSED)
    assert run.saga.state is State.STUCK  # a refusal is not repeated here either
    saga = run(Resume(skip=True))
    assert (saga.state, saga.steps[0].state) == (State.COMPENSATED, StepState.SKIPPED)


def test_a_compensation_that_finds_nothing_is_done() -> None:
    run = Run()
    run.answer()
    run.fail(REFUSED)
    saga = run.fail(Problem("NOT_FOUND", "no such reservation"))
    assert saga.state is State.COMPENSATED
    assert run.records[-2].problem.code == "NOT_FOUND"


def test_a_cancelled_saga_waits_for_its_attempt_and_then_undoes_it() -> None:
    run = Run()
    run.answer()
    saga = run(Cancel())
    assert (saga.state, saga.cause) == (State.RUNNING, Cause.CANCELLED)
    assert run(Cancel()) is saga
    saga = run.answer()
    assert (saga.state, saga.position) == (State.COMPENSATING, 0)
    assert run(Cancel()) is saga
    assert run.answer().state is State.COMPENSATED
    assert run.saga.cause is Cause.CANCELLED


def test_a_cancelled_saga_does_not_wait_out_a_pause_nor_try_again() -> None:
    run = Run()
    run.fail(AWAY)
    saga = run(Cancel())
    assert (saga.state, saga.due) == (State.COMPENSATING, 0.0)
    run = Run()
    run(Cancel())
    assert run.fail(AWAY).state is State.COMPENSATING
    run = Run()
    run(Cancel())
    assert run.fail(REFUSED).state is State.COMPENSATED


# Every event in every state that can be reached.

Key = tuple[object, ...]


def _events(saga: Saga) -> Iterator[Event]:
    current = saga.attempt.call_id if saga.attempt else "s1.0a1.secret"
    for call_id in {current, *saga.overdue[-1:], "s1.0a1.secret", "s1.9a9.wrong"}:
        yield Sent(call_id)
        yield Succeeded(call_id, {"x": 1})
        for problem in (AWAY, REFUSED, Problem("NOT_FOUND"), Problem("ABORTED")):
            yield Failed(call_id, problem)
        yield Failed(call_id, AWAY, untouched=True)
    yield Tick()
    yield Cancel()
    yield Resume()
    yield Resume(skip=True)


def _key(saga: Saga) -> Key:
    """What decides how a saga goes on."""
    steps = tuple((step.state, step.done, step.doubtful) for step in saga.steps)
    waits = (saga.attempt is not None, saga.attempt is not None and saga.attempt.deadline > 0)
    return (saga.state, saga.cause, saga.position, saga.tries, waits, saga.pause_until > 0, steps)


def _reachable() -> dict[Key, Saga]:
    first = begin(DEFINITION, "s1", {}, "secret", 1.0).saga
    found, todo = {_key(first): first}, [first]
    while todo:
        saga = todo.pop()
        for event in _events(saga):
            made = _applied(saga, event)
            if made is not None and _key(made.saga) not in found:
                found[_key(made.saga)] = made.saga
                todo.append(made.saga)
    return found


def _applied(saga: Saga, event: Event) -> Transition | None:
    try:
        return apply(DEFINITION, saga, event, saga.updated + 1000.0)
    except FailedPreconditionError:
        return None


@pytest.fixture(scope="module")
def sagas() -> list[Saga]:
    return list(_reachable().values())


def test_every_state_is_reached(sagas: list[Saga]) -> None:
    assert {saga.state for saga in sagas} == set(State)
    assert {step.state for saga in sagas for step in saga.steps} == set(StepState)
    assert {saga.cause for saga in sagas} == set(Cause)
    assert len(sagas) > 100


def test_a_saga_is_never_forgotten(sagas: list[Saga]) -> None:
    """One that has not ended and is not stuck has a time at which somebody looks at it."""
    for saga in sagas:
        rests = saga.state.ended or saga.state is State.STUCK
        assert (saga.due is None) == rests, saga
        assert not (saga.attempt and saga.pause_until)


def test_an_ended_saga_is_done_or_undone_as_a_whole(sagas: list[Saga]) -> None:
    for saga in sagas:
        if saga.state is State.SUCCEEDED:
            assert all(step.done for step in saga.steps)
        if saga.state is State.COMPENSATED:
            assert saga.cause is not Cause.NONE
            for step, run in zip(DEFINITION.steps, saga.steps, strict=True):
                undone = run.state in {StepState.COMPENSATED, StepState.SKIPPED}
                assert undone == (step.compensation is not None and run.may_have_run), saga


def test_an_event_in_any_state_is_applied_refused_or_of_no_effect(sagas: list[Saga]) -> None:
    for saga in sagas:
        for event in _events(saga):
            made = _applied(saga, event)
            if made is None:
                assert isinstance(event, Cancel | Resume)
                ended_or_stuck = saga.state.ended or saga.state is State.STUCK
                assert ended_or_stuck if isinstance(event, Cancel) else saga.state is not State.STUCK
                continue
            assert made.saga.revision == saga.revision + len(made.records)
            if made.records:
                assert made.records[-1].revision == made.saga.revision
                assert made.records[-1].state is made.saga.state
            if saga.state.ended:
                assert made.saga.state is saga.state
                assert all(record.kind is Kind.LATE_REPLY for record in made.records)
            if isinstance(event, Sent | Succeeded | Failed):  # delivered again
                assert _applied(made.saga, event) == Transition(made.saga)


def test_a_saga_that_is_answered_ends_from_any_state(sagas: list[Saga]) -> None:
    for start in sagas:
        saga = start
        for _ in range(50):
            if saga.state.ended:
                break
            event: Event = Resume() if saga.state is State.STUCK else Tick()
            if saga.attempt is not None:
                event = Succeeded(saga.attempt.call_id)
            made = _applied(saga, event)
            assert made is not None
            saga = made.saga
        assert saga.state.ended, start


def test_changes_leave_the_saga_before_them_as_it_was(sagas: list[Saga]) -> None:
    for saga in sagas:
        copy = replace(saga)
        for event in _events(saga):
            _applied(saga, event)
        assert saga == copy
