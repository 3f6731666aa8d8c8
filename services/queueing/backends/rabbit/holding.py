"""The messages of one channel that nobody has settled: ready, waiting, with consumers.

Nothing here waits or talks to anybody.
"""

from __future__ import annotations

import heapq
import itertools
import uuid
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from services.queueing.domain import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aio_pika.abc import AbstractIncomingMessage

    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Subscription

Identity = tuple[str, str, int]
"""Of a delivery that is meant: message, copy, failed attempts. Two messages with the same one are doubles."""
_FAR_S = 3600.0


@dataclass(slots=True)
class Held:
    """A message that RabbitMQ has delivered; `arrived` counts the failed attempts that it came with."""

    incoming: AbstractIncomingMessage
    carried: Carried
    number: int
    arrived: int
    not_before: float = 0.0

    def __lt__(self, other: Held) -> bool:
        return self.number < other.number

    @property
    def identity(self) -> Identity:
        """What tells it from others."""
        return self.carried.stored.message_id, self.carried.copy, self.arrived

    def as_arrived(self) -> Carried:
        """What came."""
        return replace(self.carried, attempts=self.arrived)


class Holding:
    """Everything of one channel; thrown away with it. Times are seconds since 1970."""

    def __init__(self, *, ordered: bool) -> None:
        """Empty."""
        self._ordered = ordered
        self._ready: list[tuple[int, int, Held]] = []
        self._waiting: list[tuple[float, int, Held]] = []
        self._leases: dict[str, tuple[Held, float]] = {}
        self._keys: dict[str, deque[Held]] = {}
        self._behind = 0
        self._mortal = 0
        self.present: set[Identity] = set()
        self.awaited: dict[str, int] = {}
        self.checking = 0

    def count(self) -> int:
        """Messages that the broker counts as out."""
        return len(self._ready) + len(self._waiting) + len(self._leases) + self._behind + self.checking

    def counts(self) -> tuple[int, int, int]:
        """Ready, leased, waiting for their time."""
        return len(self._ready) + self._behind, len(self._leases), len(self._waiting)

    # What comes in.

    def _key(self, held: Held) -> str:
        return held.carried.stored.ordering_key if self._ordered else ""

    def admit(self, held: Held, now: float) -> None:
        """Take a message: it may go out at once, at its time, or after those before it of its key."""
        self.present.add(held.identity)
        key = self._key(held)
        if key:
            line = self._keys.setdefault(key, deque())
            line.append(held)
            if len(line) > 1:
                self._behind += 1
                return
        self.make_ready(held, now)

    def make_ready(self, held: Held, now: float) -> None:
        """Let a message go out, when its time has come."""
        if held.not_before > now:
            heapq.heappush(self._waiting, (held.not_before, held.number, held))
            return
        level = 0 if self._ordered else -int(held.carried.stored.priority)
        heapq.heappush(self._ready, (level, held.number, held))
        self._mortal += bool(held.carried.expires)

    def wake(self, now: float) -> bool:
        """Let those go out whose time has come; whether there were any."""
        found = False
        while self._waiting and self._waiting[0][0] <= now:
            self.make_ready(heapq.heappop(self._waiting)[2], now)
            found = True
        return found

    # What goes out.

    def lease(
        self, subscription: Subscription, max_messages: int, max_bytes: int, now: float, prefix: str = ""
    ) -> list[Delivery]:
        """Hand out what is ready, under ids that begin with a prefix."""
        deliveries: list[Delivery] = []
        total, until = 0, now + subscription.ack_deadline_s
        while self._ready and len(deliveries) < max_messages:
            held = self._ready[0][2]
            size = len(held.carried.stored.data)
            if deliveries and total + size > max_bytes:
                break
            heapq.heappop(self._ready)
            self._mortal -= bool(held.carried.expires)
            total += size
            token = f"{prefix}{uuid.uuid4().hex}"
            self._leases[token] = (held, until)
            deliveries.append(Delivery(token, held.carried.stored, held.carried.attempts + 1))
        return deliveries

    def surplus(self) -> Sequence[Held]:
        """Forget what is ready, and give it; not for an ordered subscription, whose keys would stop."""
        entries = [held for _, _, held in self._ready]
        self._ready.clear()
        self._mortal = 0
        self.present.difference_update(held.identity for held in entries)
        return entries

    def take(self, token: str, now: float) -> Held | None:
        """End a lease; none if it has ended."""
        held, until = self._leases.get(token, (None, 0.0))
        if held is None or until <= now:
            return None
        del self._leases[token]
        return held

    def lend(self, token: str, held: Held, until: float) -> None:
        """Begin a lease, or set when it ends."""
        self._leases[token] = (held, until)

    def release(self, held: Held, now: float) -> bool:
        """Be done with a message; whether another of its key may go out now."""
        self.present.discard(held.identity)
        key = self._key(held)
        line = self._keys.get(key) if key else None
        if not line or line[0] is not held:
            return False
        line.popleft()
        if not line:
            del self._keys[key]
            return False
        self._behind -= 1
        self.make_ready(line[0], now)
        return True

    # What time does.

    def ended(self, now: float) -> list[Held]:
        """Messages whose leases have ended; they are out of the holding's lists."""
        tokens = [token for token, (_, until) in self._leases.items() if until <= now]
        return [self._leases.pop(token)[0] for token in tokens]

    def outlived(self, now: float) -> list[Held]:
        """Messages that have waited too long with no consumer; they are out of the holding's lists."""
        if not self._mortal:
            return []
        old = [held for _, _, held in self._ready if 0 < held.carried.expires <= now]
        if old:
            self._ready = [item for item in self._ready if not 0 < item[2].carried.expires <= now]
            heapq.heapify(self._ready)
            self._mortal -= len(old)
        return old

    def next_time(self, now: float) -> float:
        """When there is something to do."""
        times = [until for _, until in self._leases.values()]
        times += [self._waiting[0][0]] if self._waiting else []
        if self._mortal:
            times += [held.carried.expires for _, _, held in self._ready if held.carried.expires]
        return min(times, default=now + _FAR_S)

    def entries(self) -> list[Held]:
        """Everything, in no order."""
        behind: Iterator[Held] = itertools.chain.from_iterable(
            itertools.islice(line, 1, None) for line in self._keys.values()
        )
        entries = [held for _, _, held in (*self._ready, *self._waiting)]
        entries += [held for held, _ in self._leases.values()]
        entries += behind
        return entries

    def remove(self, over: Callable[[Held], bool], now: float) -> Sequence[Held]:
        """Forget messages of which this is true, and give them; those behind them of their key may go out."""
        gone = [held for held in self.entries() if over(held)]
        numbers = {held.number for held in gone}
        self._ready = [item for item in self._ready if item[1] not in numbers]
        self._waiting = [item for item in self._waiting if item[1] not in numbers]
        heapq.heapify(self._ready)
        heapq.heapify(self._waiting)
        self._mortal = sum(bool(held.carried.expires) for _, _, held in self._ready)
        self._leases = {
            token: lease for token, lease in self._leases.items() if lease[0].number not in numbers
        }
        self.present.difference_update(held.identity for held in gone)
        for key, line in list(self._keys.items()):
            left = deque(held for held in line if held.number not in numbers)
            self._behind -= max(0, len(line) - 1) - max(0, len(left) - 1)
            if not left:
                del self._keys[key]
                continue
            self._keys[key] = left
            if left[0] is not line[0]:
                self.make_ready(left[0], now)
        return gone

    def clear(self) -> Sequence[Held]:
        """Forget everything, and give it."""
        entries = self.entries()
        for collection in (self._ready, self._waiting, self._leases, self._keys, self.present, self.awaited):
            collection.clear()
        self._behind = self._mortal = 0
        return entries
