"""When an ended process may start again."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.cli.supervisor.spec import RestartPolicy


class Backoff:
    """The restart history of one process. Times are seconds on any monotonic clock."""

    def __init__(self, policy: RestartPolicy, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._rng = rng or random.Random()  # noqa: S311 - spreads restarts, guards nothing
        self._failures = 0
        self._restarts: deque[float] = deque()

    def delay(self, now: float, served_s: float) -> float:
        """Count an end and say how long to wait.

        Args:
            now: The time of the end.
            served_s: How long the process had been serving; 0 if it never was.
        """
        policy = self._policy
        if served_s >= policy.settled_s:
            self._failures = 0
        self._restarts.append(now)
        while self._restarts and self._restarts[0] <= now - policy.window_s:
            self._restarts.popleft()
        grown: float = policy.initial_s * policy.factor ** min(self._failures, 32)
        self._failures += 1
        base = policy.max_s if self.looping else min(grown, policy.max_s)
        return base * (1 + policy.jitter * self._rng.uniform(-1, 1))

    @property
    def looping(self) -> bool:
        """Whether the restarts of the window have used up the budget."""
        return len(self._restarts) > self._policy.budget
