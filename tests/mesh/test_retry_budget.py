"""The bound on retries, by a clock of the test."""

from __future__ import annotations

from services.runtime.retry_budget import WINDOW_S, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_retries_are_a_share_of_first_attempts() -> None:
    budget = RetryBudget(percent=20, min_per_second=0, clock=Clock())
    allowed = 0
    for _ in range(1000):
        budget.arrived(retry=False)
        while budget.allows():  # as if every failure were tried again until it may not be
            allowed += 1
            budget.arrived(retry=True)
    assert allowed == 200


def test_a_quiet_service_has_some_in_any_case() -> None:
    budget = RetryBudget(percent=20, min_per_second=0.5, clock=Clock())
    assert [budget.allows() for _ in range(6)] == [True] * 5 + [False]


def test_what_was_long_ago_is_forgotten() -> None:
    clock = Clock()
    budget = RetryBudget(percent=50, min_per_second=0, clock=clock)
    for _ in range(4):
        budget.arrived(retry=False)
    assert [budget.allows() for _ in range(3)] == [True, True, False]
    clock.now += WINDOW_S + 1
    assert not budget.allows()
    for _ in range(2):
        budget.arrived(retry=False)
    assert [budget.allows() for _ in range(2)] == [True, False]
