"""The bound on retries that a server keeps, since gRPC clients under xDS have none.

A failed call is answered with "do not try again" once the retries that the server let happen exceed their
share of the first attempts. When everything fails, callers then send little more than before, not a multiple.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import grpc
from prometheus_client import Counter

if TYPE_CHECKING:
    from collections.abc import Callable

ATTEMPTS_KEY = "grpc-previous-rpc-attempts"
"""Request header that gRPC sets on every attempt but the first."""
STOP = ("grpc-retry-pushback-ms", "-1")
"""Trailer after which gRPC makes no further attempt."""
RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
    }
)
"""Statuses that an xDS retry policy can name."""
WINDOW_S = 10

STOPPED = Counter("plexus_retries_stopped_total", "Failed calls whose caller was told not to try again.")


class RetryBudget:
    """Counts attempts in a sliding window of seconds."""

    def __init__(
        self,
        *,
        percent: float = 10,
        min_per_second: float = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the bound.

        Args:
            percent: Retries as a share of first attempts.
            min_per_second: Retries that are allowed in any case.
            clock: Seconds.
        """
        self._clock = clock
        self._seconds: deque[list[int]] = deque()  # second, first attempts, retries that were let happen
        self._first = 0
        self._allowed = 0
        self.percent = percent
        self.min_per_second = min_per_second

    def configure(self, percent: float, min_per_second: float) -> None:
        """Set another bound."""
        self.percent = percent
        self.min_per_second = min_per_second

    def arrived(self, *, retry: bool) -> None:
        """Count a call."""
        if not retry:
            self._now()[1] += 1
            self._first += 1

    def allows(self) -> bool:
        """Decide whether the caller of a call that fails now may try again, and count it if so."""
        now = self._now()
        bound = max(self._first * self.percent / 100, self.min_per_second * WINDOW_S)
        if self._allowed + 1 > bound:
            STOPPED.inc()
            return False
        now[2] += 1
        self._allowed += 1
        return True

    def _now(self) -> list[int]:
        second = int(self._clock())
        seconds = self._seconds
        if not seconds or seconds[-1][0] != second:
            seconds.append([second, 0, 0])
            while seconds[0][0] <= second - WINDOW_S:
                _, first, allowed = seconds.popleft()
                self._first -= first
                self._allowed -= allowed
        return seconds[-1]
