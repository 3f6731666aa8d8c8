"""What this process holds of a subscription: messages that RabbitMQ has delivered and nobody has settled.

RabbitMQ knows only that a message is out; leases, attempts, order within a key and priority between queues
are kept here, and lost with the connection: then the broker delivers everything unsettled again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from services.queueing.backends.rabbit.link import BROKEN, away, interrupted
from services.queueing.backends.rabbit.topology import levels, queue_name
from services.queueing.backends.rabbit.wire import Carried, decode
from services.queueing.domain import MAX_HISTORY, MAX_REASON, Delivery
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.domain import Refusal
    from services.queueing.resources import Subscription

log = structlog.get_logger(__name__)

PREFETCH = {3: 250, 2: 250, 1: 1000, 0: 250}
"""Messages that the broker delivers ahead, by priority."""
_REMEMBERED = 20_000
_RETRY_S = 0.2
_RETRY_MAX_S = 5.0
_WATCH_S = 5.0
_ARRIVAL_S = 2.0
LEASE_EXPIRED = "lease expired"
TTL_EXPIRED = "expired"


class Settling(Protocol):
    """Where messages go that do not stay with the broker; durable when a call returns."""

    async def defer(self, subscription: Subscription, carried: Carried, due: float) -> None:
        """Keep a message until its time."""
        ...

    async def bury(self, subscription: Subscription, carried: Carried, reason: str) -> None:
        """Give a message up."""
        ...

    async def settled(self, subscription: Subscription, carried: Carried) -> bool:
        """Whether a message delivered again was deferred or buried before."""
        ...

    async def declare(self, subscription: Subscription) -> None:
        """Make the subscription's queues and bindings.

        Raises:
            NotFoundError: Somebody deleted the subscription.
        """
        ...


@dataclass(slots=True)
class _Held:
    incoming: AbstractIncomingMessage
    carried: Carried
    number: int
    not_before: float = 0.0

    def __lt__(self, other: _Held) -> bool:
        return self.number < other.number


@dataclass(slots=True)
class _Holding:
    """Everything of one channel; thrown away with it."""

    ready: list[tuple[int, int, _Held]] = field(default_factory=list)
    waiting: list[tuple[float, int, _Held]] = field(default_factory=list)
    leases: dict[str, tuple[_Held, float]] = field(default_factory=dict)
    keys: dict[str, deque[_Held]] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    settling: int = 0

    def count(self) -> int:
        """Messages that the broker counts as out."""
        behind = sum(len(queue) - 1 for queue in self.keys.values())
        return len(self.ready) + len(self.waiting) + len(self.leases) + behind + self.settling


class Window:
    """One subscription's consumer; runs from `open` to `close`."""

    def __init__(self, subscription: Subscription, link: Link, settling: Settling) -> None:
        self.subscription = subscription
        self.used = time.monotonic()
        self._link = link
        self._settling = settling
        self._numbers = itertools.count()
        self._held = _Holding()
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._chores: asyncio.Queue[_Held] = asyncio.Queue()
        self._news = asyncio.Event()
        self._timer = asyncio.Event()
        self._opened = asyncio.Event()
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: AbstractChannel | None = None
        self.closed = False

    def open(self) -> None:
        """Begin."""
        for work in (self._run(), self._time(), self._do_chores()):
            self._tasks.append(asyncio.create_task(work, name=f"window-{self.subscription.name}"))

    async def close(self) -> None:
        """End; the broker has everything unsettled back."""
        self.closed = True
        self._opened.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._shut()
        self._wake()

    @property
    def idle_s(self) -> float:
        """For how long nobody has asked or held anything."""
        return 0.0 if self._held.leases else time.monotonic() - self.used

    # The consumer.

    async def _run(self) -> None:
        pause = _RETRY_S
        while True:
            try:
                channel = await self._open_channel()
                pause = _RETRY_S
                await self._watch(channel)
            except NotFoundError:
                self.closed = True
                await self._shut()
                self._opened.set()
                self._wake()
                return
            except (*BROKEN, PlexusError, TimeoutError) as error:
                log.warning("window_lost", subscription=self.subscription.name, error=type(error).__name__)
            except asyncio.CancelledError:
                if not interrupted():
                    raise
            self._opened.clear()
            await self._shut()
            await asyncio.sleep(pause)
            pause = min(_RETRY_MAX_S, pause * 2)

    async def _shut(self) -> None:
        self._held = _Holding()
        channel, self._channel = self._channel, None
        if channel is None or channel.is_closed:
            return
        try:
            # Not by basic.cancel: a single active consumer that leaves so hands over out of order.
            async with asyncio.timeout(_RETRY_MAX_S):
                await channel.close()
        except (*BROKEN, TimeoutError) as error:
            log.info("channel_close_failed", error=type(error).__name__)

    async def _open_channel(self) -> AbstractChannel:
        await self._settling.declare(self.subscription)
        channel = await self._link.channel()
        holding = self._held = _Holding()
        self._channel = channel
        waiting = 0
        for level in levels(self.subscription):
            queue = await channel.get_queue(queue_name(self.subscription.name, level), ensure=True)
            prefetch = PREFETCH[int(level)]
            waiting += min(prefetch, queue.declaration_result.message_count or 0)
            await channel.set_qos(prefetch_count=prefetch)

            async def arrive(incoming: AbstractIncomingMessage) -> None:
                if self._held is holding:
                    self._arrive(incoming)

            await queue.consume(arrive)
        await self._arrivals(waiting)
        self._opened.set()
        self._wake()
        return channel

    async def _arrivals(self, count: int) -> None:
        """Wait a while for what was in the queues, so that the first pull sees it."""
        try:
            async with asyncio.timeout(_ARRIVAL_S):
                while self._held.count() < count:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return  # another process took it

    async def _watch(self, channel: AbstractChannel) -> None:
        """Return when the consumer is gone: with its channel, or in silence."""
        closed = asyncio.Event()
        channel.close_callbacks.add(lambda *_: closed.set())
        while not channel.is_closed:
            try:
                async with asyncio.timeout(_WATCH_S):
                    await closed.wait()
            except TimeoutError:
                if not await self._is_consuming():
                    log.warning("consumer_missing", subscription=self.subscription.name)
                    return

    async def _is_consuming(self) -> bool:
        """Ask the broker, since a cancelled consumer shows nowhere in the client."""
        probe = await self._link.channel()
        try:
            async with asyncio.timeout(_RETRY_MAX_S):
                for level in levels(self.subscription):
                    queue = await probe.get_queue(queue_name(self.subscription.name, level), ensure=True)
                    if not queue.declaration_result.consumer_count:
                        return False
                return True
        finally:
            if not probe.is_closed:
                await probe.close()

    def _arrive(self, incoming: AbstractIncomingMessage) -> None:
        self._arrived.set()
        carried = decode(incoming)
        held = _Held(incoming, carried, next(self._numbers))
        stored = carried.stored
        self._held.awaited.discard(stored.message_id)
        key = (stored.message_id, carried.copy)
        unwanted = not self.subscription.wants(stored.attributes)
        if incoming.redelivered or unwanted or (key in self._seen and not carried.attempts):
            self._held.settling += 1
            self._chores.put_nowait(held)  # to ask or to acknowledge takes a while
            return
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self._admit(held)

    def _admit(self, held: _Held) -> None:
        stored = held.carried.stored
        if not held.carried.expires and self.subscription.ttl_s:
            held.carried.expires = max(stored.published, 1.0) + self.subscription.ttl_s
        if self.subscription.ordered and stored.ordering_key:
            queue = self._held.keys.setdefault(stored.ordering_key, deque())
            queue.append(held)
            if len(queue) > 1:
                return
        self._make_ready(held)

    def _make_ready(self, held: _Held) -> None:
        if held.not_before > time.time():
            heapq.heappush(self._held.waiting, (held.not_before, held.number, held))
            self._timer.set()
            return
        level = -int(held.carried.stored.priority) if not self.subscription.ordered else 0
        heapq.heappush(self._held.ready, (level, held.number, held))
        if held.carried.expires:
            self._timer.set()
        self._wake()

    async def _do_chores(self) -> None:
        while True:
            held = await self._chores.get()
            holding = self._held
            try:
                await self._look_into(held)
            except PlexusError as error:
                log.warning("message_stuck", subscription=self.subscription.name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                if not held.incoming.channel.is_closed:
                    self._chores.put_nowait(held)
                    continue
            holding.settling -= 1
            self._arrived.set()

    async def _look_into(self, held: _Held) -> None:
        stored = held.carried.stored
        wanted = self.subscription.wants(stored.attributes)
        known = not held.incoming.redelivered or (
            await self._settling.settled(self.subscription, held.carried)
        )
        if not wanted or known:
            await self._ack(held)
            return
        self._seen[stored.message_id, held.carried.copy] = None
        if not held.incoming.channel.is_closed:
            self._admit(held)

    # Time.

    async def _time(self) -> None:
        while True:
            self._timer.clear()
            await self.settle()
            pause = self._next() - time.time()
            try:
                async with asyncio.timeout(max(0.0, min(pause, 60.0))):
                    await self._timer.wait()
            except TimeoutError:
                continue

    def _next(self) -> float:
        held = self._held
        times = [until for _, until in held.leases.values()]
        times += [held.waiting[0][0]] if held.waiting else []
        times += [entry.carried.expires for _, _, entry in held.ready if entry.carried.expires]
        return min(times, default=time.time() + 3600)

    async def settle(self) -> None:
        """Do what the time asks for: end leases, bring back what waited, give up what waited too long."""
        now = time.time()
        held = self._held
        for token in [token for token, (_, until) in held.leases.items() if until <= now]:
            entry, _ = held.leases.pop(token, (None, 0))
            if entry is not None:
                await self._fail(entry, LEASE_EXPIRED, pause_s=0.0)
        while held.waiting and held.waiting[0][0] <= time.time():
            self._make_ready(heapq.heappop(held.waiting)[2])
        old = [entry for _, _, entry in held.ready if 0 < entry.carried.expires <= now]
        if old:
            held.ready = [item for item in held.ready if not 0 < item[2].carried.expires <= now]
            heapq.heapify(held.ready)
            for entry in old:
                await self._fail(entry, TTL_EXPIRED, dead=True)

    # What pullers do.

    def expect(self, message_ids: Sequence[str]) -> None:
        """Messages published here that will arrive: a pull that does not wait waits for them."""
        held = self._held
        if self._opened.is_set() and held.count() + len(held.awaited) < PREFETCH[1] // 2:
            held.awaited.update(message_ids)

    async def ready(self) -> None:
        """Wait until the consumer is open and what was published here before has come.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        self.used = time.monotonic()
        try:
            async with asyncio.timeout(_RETRY_MAX_S * 2):
                await self._opened.wait()
        except TimeoutError:
            raise away() from None
        try:
            async with asyncio.timeout(_ARRIVAL_S):
                while self._held.awaited or self._held.settling:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            self._held.awaited.clear()  # another process has them

    def news(self) -> asyncio.Event:
        """Set when something becomes ready."""
        if self._news.is_set():
            self._news = asyncio.Event()
        return self._news

    def _wake(self) -> None:
        self._news.set()

    def lease(self, max_messages: int, max_bytes: int) -> list[Delivery]:
        """Hand out what is ready."""
        self.used = time.monotonic()
        held = self._held
        deliveries: list[Delivery] = []
        total, now = 0, time.time()
        while held.ready and len(deliveries) < max_messages:
            entry = held.ready[0][2]
            size = len(entry.carried.stored.data)
            if deliveries and total + size > max_bytes:
                break
            heapq.heappop(held.ready)
            total += size
            token = uuid.uuid4().hex
            held.leases[token] = (entry, now + self.subscription.ack_deadline_s)
            deliveries.append(Delivery(token, entry.carried.stored, entry.carried.attempts + 1))
        if deliveries:
            self._timer.set()
        return deliveries

    def _take(self, token: str) -> _Held | None:
        entry, until = self._held.leases.get(token, (None, 0.0))
        if entry is None or until <= time.time():
            return None
        del self._held.leases[token]
        return entry

    async def acknowledge(self, tokens: Sequence[str]) -> list[str]:
        """Be done with messages."""
        expired = []
        for token in tokens:
            entry = self._take(token)
            if entry is None or not await self._ack(entry):
                expired.append(token)
        return expired

    async def nack(self, refusals: Sequence[Refusal]) -> list[str]:
        """Take messages back."""
        expired = []
        for refusal in refusals:
            entry = self._take(refusal.ack_id)
            if entry is None:
                expired.append(refusal.ack_id)
                continue
            reason = refusal.reason[:MAX_REASON] or "not acknowledged"
            await self._fail(entry, reason, pause_s=refusal.delay_s, dead=refusal.dead)
        return expired

    def extend(self, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end."""
        expired = []
        for token, seconds in leases:
            entry = self._take(token)
            if entry is None:
                expired.append(token)
            elif seconds > 0:
                self._held.leases[token] = (entry, time.time() + seconds)
                self._timer.set()
            else:
                self._make_ready(entry)
        return expired

    async def _fail(
        self, held: _Held, reason: str, *, pause_s: float | None = None, dead: bool = False
    ) -> None:
        """Note a failed attempt; the message comes again or is given up."""
        carried, now = held.carried, time.time()
        policy = carried.retry or self.subscription.retry
        if reason != TTL_EXPIRED:
            carried.attempts += 1
        carried.history = [*carried.history, (now, reason)][-MAX_HISTORY:]
        if dead or carried.attempts >= policy.max_attempts:
            await self._settling.bury(self.subscription, carried, reason)
            await self._ack(held)
            return
        pause = policy.pause_s(carried.attempts) if pause_s is None else pause_s
        in_place = self.subscription.ordered and carried.stored.ordering_key
        if pause == 0 or in_place:
            held.not_before = now + pause
            if not held.incoming.channel.is_closed:
                self._make_ready(held)
            return
        await self._settling.defer(self.subscription, carried, now + pause)
        await self._ack(held)

    async def _ack(self, held: _Held) -> bool:
        key = held.carried.stored.ordering_key
        queue = self._held.keys.get(key) if self.subscription.ordered and key else None
        try:
            await held.incoming.ack()
        except BROKEN:
            return False  # the broker will deliver it again
        except asyncio.CancelledError:
            if interrupted():
                return False
            raise
        if queue and queue[0] is held:
            queue.popleft()
            if queue:
                self._make_ready(queue[0])
            else:
                del self._held.keys[key]
        return True

    # What is counted.

    def counts(self) -> tuple[int, int, int]:
        """Ready, leased, waiting for their time."""
        held = self._held
        behind = sum(len(queue) - 1 for queue in held.keys.values())
        return len(held.ready) + behind, len(held.leases), len(held.waiting)

    async def clear(self) -> None:
        """Be done with everything that is held."""
        held = self._held
        entries = [entry for _, _, entry in (*held.ready, *held.waiting)]
        entries += [entry for entry, _ in held.leases.values()]
        entries += [entry for queue in held.keys.values() for entry in itertools.islice(queue, 1, None)]
        for collection in (held.ready, held.waiting, held.leases, held.keys, held.awaited):
            collection.clear()
        for entry in entries:
            await self._ack(entry)
