"""What the supervisor runs, and under which rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Run = Callable[[Callable[[], None], asyncio.Event], Coroutine[Any, Any, None]]
"""`await run(ready, stop)`: calls ready() when serving; drains and returns once stop is set."""


class State(StrEnum):
    """Where a process is in its life."""

    WAITING = "waiting"
    """An earlier start phase is not ready yet."""
    STARTING = "starting"
    SERVING = "serving"
    BACKOFF = "backoff"
    """Ended unasked; started again when the back-off is over."""
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process.

    Attributes:
        name: Unique; names the log file and the log prefix.
        run: What the child does.
        start_phase: Phases start in ascending order, each when the one before is ready.
        stop_phase: Phases stop in ascending order, each when the one before has ended.
        address: Where it serves if that is fixed, as host:port.
    """

    name: str
    run: Run
    start_phase: int = 0
    stop_phase: int = 0
    address: str | None = None


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential back-off with a budget.

    Attributes:
        initial_s: Delay before the first restart.
        factor: Growth of the delay with each further one.
        max_s: Longest delay; also the delay once the budget is spent.
        jitter: Random share added to or taken from each delay.
        budget: Restarts within `window_s` before a process counts as crash-looping.
        window_s: Span of the budget.
        settled_s: Serving this long resets the delay.
    """

    initial_s: float = 0.1
    factor: float = 2.0
    max_s: float = 30.0
    jitter: float = 0.2
    budget: int = 8
    window_s: float = 60.0
    settled_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Bounds of start and stop.

    Attributes:
        phase_wait_s: A start phase waits this long for the one before, then goes on without it.
        grace_s: Time between SIGTERM and SIGKILL.
    """

    phase_wait_s: float = 5.0
    grace_s: float = 20.0
