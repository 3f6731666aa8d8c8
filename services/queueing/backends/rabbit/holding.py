"""The messages of one channel that nobody has settled: ready, waiting, with consumers.

Nothing here waits or talks to anybody.
"""

from __future__ import annotations

import heapq
import itertools
import uuid
from collections import deque
from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.held import Rest
from services.queueing.backends.rabbit.lent import Lent
from services.queueing.domain import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from services.queueing.backends.rabbit.held import Held, Identity
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Subscription

_FAR_S = 3600.0
_KEPT = 50
"""Of a line that is in the state, at most so many messages are here too."""
_NEAR = 1000
"""Of lines in the state, about so many messages are here that may be handed out, now or after others."""


class Holding:
    """Everything of one channel; thrown away with it. Times are seconds since 1970."""

    def __init__(self, *, ordered: bool) -> None:
        """Empty."""
        self._ordered = ordered
        self._ready: list[tuple[int, int, Held]] = []
        self._waiting: list[tuple[float, int, Held]] = []
        self._lent = Lent()
        self._keys: dict[str, deque[Held]] = {}
        self._behind = 0
        self._mortal = 0
        self.present: set[Identity] = set()
        self.awaited: dict[str, int] = {}
        self.checking = 0
        self.aside: dict[str, Rest] = {}
        self._hungry: dict[str, None] = {}
        self._wanting: dict[int, Held] = {}
        self.leftover: list[Held] = []
        self.parked = 0
        self._unwritten: deque[Held] = deque()
        self._outside = 0
        self._position = 0

    def counts(self) -> tuple[int, int, int]:
        """Ready, leased, waiting for their time."""
        aside = self._outside + sum(rest.unread for rest in self.aside.values())
        ready = len(self._ready) + len(self._wanting) + self._behind + aside
        return ready, len(self._lent), len(self._waiting)

    # What comes in.

    def _key(self, held: Held) -> str:
        return held.carried.stored.ordering_key if self._ordered else ""

    def admit(self, held: Held, now: float) -> None:
        """Take a message: it may go out at once, at its time, or after those before it of its key."""
        self.present.add(held.identity)
        key = self._key(held)
        rest = self.aside.get(key)
        if rest is not None:
            held.outside = True
            rest.unwritten += 1
            self._outside += 1
            self._unwritten.append(held)
            return
        self._join(key, held, now)

    def _join(self, key: str, held: Held, now: float) -> None:
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
        if held.thin:
            self._wanting[held.number] = held
            return
        held.ready = True
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
        outlived = []
        total, until = 0, now + subscription.ack_deadline_s
        while self._ready and len(deliveries) < max_messages:
            held = self._ready[0][2]
            if 0 < held.carried.expires <= now:
                outlived.append(heapq.heappop(self._ready))  # is about to be given up
                continue
            size = len(held.carried.stored.data)
            if deliveries and total + size > max_bytes:
                break
            heapq.heappop(self._ready)
            self._mortal -= bool(held.carried.expires)
            total += size
            token = f"{prefix}{uuid.uuid4().hex}"
            self.lend(token, held, until)
            deliveries.append(Delivery(token, held.carried.stored, held.carried.attempts + 1))
            held.ready, held.since = False, now
            held.lighten()
        for item in outlived:
            heapq.heappush(self._ready, item)
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
        return self._lent.take(token, now)

    def lend(self, token: str, held: Held, until: float) -> None:
        """Begin a lease, or set when it ends."""
        self._lent.lend(token, held, until)

    def release(self, held: Held, now: float) -> bool:
        """Be done with a message; whether another of its key may go out now."""
        self.present.discard(held.identity)
        held.done = True
        self.parked -= held.kept
        key = self._key(held)
        line = self._keys.get(key) if key else None
        if not line or line[0] is not held:
            return False
        line.popleft()
        if line:
            self._behind -= 1
            self.make_ready(line[0], now)
        else:
            del self._keys[key]
        if key in self.aside:
            self.aside[key].last = max(self.aside[key].last, held.position)
            self._consider(key)
        return bool(line)

    # Lines that are in the state.

    @property
    def idle(self) -> bool:
        """Whether nothing may be handed out."""
        return not self._ready

    @property
    def busy(self) -> bool:
        """Whether there is something to write or to read."""
        return bool(self.leftover or self._unwritten or (self._has_room and (self._hungry or self._wanting)))

    @property
    def _has_room(self) -> bool:
        """Whether what the state has may be read: not while much waits here for consumers."""
        return len(self._ready) < _NEAR

    @property
    def _kept(self) -> int:
        """Of a line in the state, how many messages may be here: the fewer, the more lines there are."""
        return max(1, min(_KEPT, _NEAR // max(1, len(self.aside))))

    def resume(self, counts: Mapping[str, int], last: int) -> None:
        """Begin with lines that are in the state already: how long each one is, and the last position."""
        self.aside = {key: Rest(unread=count) for key, count in counts.items()}
        self._hungry.update(dict.fromkeys(self.aside))
        self.parked, self._position = sum(counts.values()), last

    def recount(self, positions: Mapping[str, Sequence[int]]) -> None:
        """Some messages that only the state had are over; the positions of those that it has now, by key."""
        for key, rest in list(self.aside.items()):
            last = self._last_of(key)
            unread = sum(position > last for position in positions.get(key, ()))
            self.parked -= rest.unread - unread
            rest.unread = unread
            if not unread:
                self._hungry.pop(key, None)
            self._consider(key)

    def crowding(self, before: float, count: int) -> list[str]:
        """Keys that have stood still since before a time, the longest lines first, with so many messages.

        Of such a key the first message is with a consumer, or in a pause, or others wait behind it.
        """
        lines = []
        for key, line in self._keys.items():
            first = line[0]
            # Of what is no line in the state, the state has the first message at most.
            length = len(line) - bool(first.position)
            last = line[1] if len(line) > 1 else first
            if length and key not in self.aside and not last.ready and last.since <= before:
                lines.append((length, key))
        lines.sort(reverse=True)
        total, keys = 0, []
        for length, key in lines:
            if total >= count:
                break
            total += length
            keys.append(key)
        return keys

    def set_aside(self, key: str) -> None:
        """Have a whole line written down, and what comes after it."""
        there = [held for held in self._keys[key] if not held.position]
        self.aside[key] = Rest(unwritten=len(there))
        self._unwritten.extend(there)

    def unwritten_next(self, limit: int) -> list[Held]:
        """What is to be written, with positions, in order; again the same until `written` is called."""
        over = [held for held in self._unwritten if held.done and not held.position]
        if over:
            self._unwritten = deque(held for held in self._unwritten if held.position or not held.done)
            for held in over:
                self.aside[self._key(held)].unwritten -= 1
            for key in {self._key(held) for held in over}:
                self._consider(key)
        found: list[Held] = []
        for held in itertools.islice(self._unwritten, max(0, limit)):
            if not held.position:
                self._position += 1
                held.position = self._position
            found.append(held)
        return found

    def written(self, batch: Sequence[Held]) -> None:
        """The state has these, the first of what is to be written."""
        keys = {self._key(held): None for held in batch}
        for held in batch:
            self._unwritten.popleft()
            key = self._key(held)
            rest = self.aside[key]
            rest.unwritten -= 1
            if held.done:
                self.leftover.append(held)
                continue
            held.kept = True
            self.parked += 1
            if held.outside:
                self._outside -= 1
                rest.unread += 1
                self.present.discard(held.identity)
            elif not held.ready and self._keys[key][0] is held:
                held.lighten()
        for key in keys:
            self._shorten(key)
            self._consider(key)

    def _shorten(self, key: str) -> None:
        """Forget the end of a line that the state has."""
        line = self._keys.get(key)
        kept = self._kept
        while line and len(line) > kept and line[-1].kept:
            held = line.pop()
            self._behind -= 1
            self.present.discard(held.identity)
            self.aside[key].unread += 1
            self.aside[key].last = line[-1].position

    def _consider(self, key: str) -> None:
        """Ask for more of a line that has become short; one that has no more is as others again."""
        rest, length = self.aside[key], len(self._keys.get(key, ()))
        if rest.unread and length <= self._kept // 2:
            self._hungry[key] = None
        elif not rest.unread and not rest.unwritten and length <= 1:
            del self.aside[key]

    def hungry(self, count: int) -> tuple[dict[str, int], int]:
        """What is to be read next: after which position of which lines, and how many messages of each."""
        if not self._has_room:
            return {}, 0
        some = itertools.islice(self._hungry, count)
        return {key: self._last_of(key) for key in some}, max(1, self._kept // 2)

    def wanting(self, count: int) -> list[Held]:
        """Messages that may be handed out as soon as their content has been read."""
        return list(itertools.islice(self._wanting.values(), count if self._has_room else 0))

    def filled(self, held: Held, kept: Carried | None, now: float) -> None:
        """The content has been read; a message that the state has no more is over."""
        if self._wanting.pop(held.number, None) is None:
            return
        if kept is None:
            self.release(held, now)
            return
        held.fill(kept)
        self.make_ready(held, now)

    def _last_of(self, key: str) -> int:
        """Position of the last message of a line that is here."""
        line = self._keys.get(key)
        return max(self.aside[key].last, line[-1].position) if line else self.aside[key].last

    def refill(
        self, key: str, found: Sequence[Held], now: float, *, complete: bool, past: Collection[int] = ()
    ) -> None:
        """Messages of a line, read from the state, the last ones of it if `complete`.

        Those with the numbers `past` are over.
        """
        self._hungry.pop(key, None)
        rest = self.aside[key]
        rest.unread = 0 if complete else max(0, rest.unread - len(found))
        for held in found:
            held.kept = True
            rest.last = held.position
            if held.number in past:
                held.done = True
                self.parked -= 1
                self.leftover.append(held)
                continue
            self.present.add(held.identity)
            self._join(key, held, now)
        self._consider(key)

    # What time does.

    def ended(self, now: float) -> list[Held]:
        """Messages whose leases have ended; they are out of the holding's lists."""
        return self._lent.ended(now)

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
        times = [self._lent.next_end(), now + _FAR_S]
        times += [self._waiting[0][0]] if self._waiting else []
        if self._mortal:
            times += [held.carried.expires for _, _, held in self._ready if held.carried.expires]
        return min(times)

    def entries(self) -> list[Held]:
        """Everything, in no order."""
        behind: Iterator[Held] = itertools.chain.from_iterable(
            itertools.islice(line, 1, None) for line in self._keys.values()
        )
        entries = [held for _, _, held in (*self._ready, *self._waiting)]
        entries += self._lent.entries()
        entries += self._wanting.values()
        entries += behind
        entries += [held for held in self._unwritten if held.outside]
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
        self._wanting = {number: held for number, held in self._wanting.items() if number not in numbers}
        self._lent.remove(numbers)
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
        self._remove_aside(gone)
        return gone

    def _remove_aside(self, gone: Sequence[Held]) -> None:
        for held in gone:
            held.done = True
            if held.kept:
                self.parked -= 1
                self.leftover.append(held)
                rest = self.aside.get(self._key(held))
                if rest is not None:
                    rest.last = max(rest.last, held.position)
            elif held.outside:
                self._outside -= 1
                held.outside = False
        for key in list(self.aside):
            self._consider(key)

    def clear(self) -> Sequence[Held]:
        """Forget everything, and give it."""
        entries = self.entries()
        for collection in (self._ready, self._waiting, self._lent, self._keys, self.present, self.awaited):
            collection.clear()
        for lines in (self.aside, self._hungry, self._wanting, self.leftover, self._unwritten):
            lines.clear()
        self._behind = self._mortal = self._outside = self.parked = 0
        return entries
