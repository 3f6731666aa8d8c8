"""Messages that consumers have, each until its time. Times are seconds since 1970."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from services.queueing.backends.rabbit.held import Held

_SPARE = 100


class Lent:
    """Leases by their ids; what has ended is found without looking at the others."""

    def __init__(self) -> None:
        """Nobody has anything."""
        self._leases: dict[str, tuple[Held, float]] = {}
        self._ends: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def lend(self, token: str, held: Held, until: float) -> None:
        """Begin a lease, or set when it ends."""
        self._leases[token] = (held, until)
        heapq.heappush(self._ends, (until, token))
        if len(self._ends) > 2 * len(self._leases) + _SPARE:
            self._ends = [(end, each) for each, (_, end) in self._leases.items()]
            heapq.heapify(self._ends)

    def take(self, token: str, now: float) -> Held | None:
        """End a lease; none if it has ended."""
        held, until = self._leases.get(token, (None, 0.0))
        if held is None or until <= now:
            return None
        del self._leases[token]
        return held

    def ended(self, now: float) -> list[Held]:
        """Those whose time is over, which are not in here any more."""
        found: list[Held] = []
        while self._ends and self._ends[0][0] <= now:
            _, token = heapq.heappop(self._ends)
            held, until = self._leases.get(token, (None, 0.0))
            if held is not None and until <= now:
                del self._leases[token]
                found.append(held)
        return found

    def next_end(self) -> float:
        """When the first lease ends; infinity without any."""
        while self._ends and self._leases.get(self._ends[0][1], (None, 0.0))[1] != self._ends[0][0]:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def entries(self) -> list[Held]:
        """Everything."""
        return [held for held, _ in self._leases.values()]

    def remove(self, numbers: Collection[int]) -> None:
        """Forget messages with these numbers."""
        self._leases = {
            token: lease for token, lease in self._leases.items() if lease[0].number not in numbers
        }

    def clear(self) -> None:
        """Forget everything."""
        self._leases.clear()
        self._ends.clear()
