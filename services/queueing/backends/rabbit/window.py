"""A subscription's consumer in this process: messages come in, are leased, and settled.

RabbitMQ knows only that a message is out; leases, attempts, order within a key and priority between queues
are kept here, and lost with the connection: then the broker delivers everything unsettled again.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import structlog

from services.queueing.backends.rabbit.acks import Acks
from services.queueing.backends.rabbit.holding import Held, Holding, Identity
from services.queueing.backends.rabbit.link import BROKEN, away, end, interrupted
from services.queueing.backends.rabbit.topology import levels, queue_name
from services.queueing.backends.rabbit.wire import AGAIN, Carried, decode
from services.queueing.domain import MAX_HISTORY, MAX_REASON, Delivery
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.domain import Refusal
    from services.queueing.resources import Subscription

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

PREFETCH = {3: 250, 2: 250, 1: 1000, 0: 250}
"""Messages that the broker delivers ahead, by priority."""
_REMEMBERED = 20_000
_CHECKED = 500
_RETRY_S = 0.2
_RETRY_MAX_S = 5.0
_WATCH_S = 5.0
ARRIVAL_S = 2.0
"""How long a pull waits for what was published in this process before."""
_REST_S = 0.01
_SKEW_S = 5.0
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

    async def finish(self, subscription: Subscription, arrived: Sequence[Carried]) -> None:
        """Remember that deliveries of deduplicated messages are over, given as they arrived."""
        ...

    async def settled(self, subscription: Subscription, arrived: Sequence[Carried]) -> list[bool]:
        """For each message that came, whether it was finished, deferred or buried before."""
        ...

    async def declare(self, subscription: Subscription) -> None:
        """Make the subscription's queues and bindings.

        Raises:
            NotFoundError: Somebody deleted the subscription.
        """
        ...


class Window:
    """One subscription's consumer; runs from `open` to `close`."""

    def __init__(
        self,
        subscription: Subscription,
        link: Link,
        settling: Settling,
        *,
        shared: bool = False,
        address: Callable[[], str] = str,
    ) -> None:
        """Set it up; nothing runs yet.

        Args:
            subscription: What to consume; replaced when its settings change.
            link: To RabbitMQ.
            settling: Where messages go from here.
            shared: Whether other processes consume the same subscription.
            address: Of this process among them, which the ids of its leases begin with.
        """
        self.subscription = subscription
        self.used = time.monotonic()
        self.closed = False
        self.resting = False
        self._askers = 0
        self._address = address
        self._link = link
        self._settling = settling
        # Doubles of what was published later are known by their ids here, those of before by the state.
        self._doubtful_to = math.inf if shared else time.time() + _SKEW_S
        self._numbers = itertools.count()
        self._marks = itertools.count()
        self._held = Holding(ordered=subscription.ordered)
        self._acks: Acks | None = None
        self._seen: OrderedDict[Identity, None] = OrderedDict()
        self._chores: asyncio.Queue[tuple[Holding, Held]] = asyncio.Queue()
        self._news = asyncio.Event()
        self._timer = asyncio.Event()
        self._planned = 0.0
        self._opened = asyncio.Event()
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._works: set[asyncio.Task[Any]] = set()
        self._channel: AbstractChannel | None = None
        self._consumers: list[tuple[AbstractQueue, str]] = []
        self._turning = asyncio.Lock()

    def open(self) -> None:
        """Begin."""
        for work in (self._run(), self._time(), self._do_chores()):
            self._tasks.append(asyncio.create_task(work, name=f"window-{self.subscription.name}"))

    async def close(self) -> None:
        """End; the broker has everything unsettled back."""
        self.closed = True
        self._opened.set()
        await end(self._tasks)
        await self._shut()
        await asyncio.gather(*self._works, return_exceptions=True)
        self._wake()

    @property
    def idle_s(self) -> float:
        """For how long nobody has asked."""
        return 0.0 if self._askers else time.monotonic() - self.used

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Somebody waits for messages during the block."""
        self._askers += 1
        try:
            yield
        finally:
            self._askers -= 1
            self.used = time.monotonic()

    @property
    def leased(self) -> bool:
        """Whether anybody holds anything."""
        return bool(self._held.counts()[1])

    async def rest(self) -> None:
        """Give back what nobody has asked for, and take nothing more until somebody asks.

        Else it would be kept from the consumers of other replicas. Not for ordered subscriptions: what is
        given back so comes out of order.
        """
        async with self._turning:
            acks = self._acks
            if self.resting or not self._opened.is_set() or self.subscription.ordered or acks is None:
                return
            self.resting = True
            for queue, tag in self._consumers:
                await queue.cancel(tag)
            await acks.give_back([held.incoming.delivery_tag or 0 for held in self._held.surplus()])

    async def _wake_up(self) -> None:
        async with self._turning:
            channel = self._channel
            if self.resting and channel is not None and not channel.is_closed:
                self._held.awaited.clear()
                before = self._held.count()
                await self._arrivals(before + await self._consume(channel))

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
        self._held = Holding(ordered=self.subscription.ordered)
        self._acks = None
        channel, self._channel = self._channel, None
        if channel is None or channel.is_closed:
            return
        try:
            # Not by basic.cancel: a single active consumer that leaves so hands over out of order.
            async with asyncio.timeout(_RETRY_MAX_S):
                await channel.close()
        except (*BROKEN, TimeoutError) as error:
            log.info("channel_close_failed", error=type(error).__name__)
        except asyncio.CancelledError:
            if not interrupted():
                raise

    async def _open_channel(self) -> AbstractChannel:
        await self._settling.declare(self.subscription)
        channel = await self._link.channel()
        self._held = Holding(ordered=self.subscription.ordered)
        self._acks = Acks(await channel.get_underlay_channel())
        self._channel = channel
        await self._arrivals(await self._consume(channel))
        self._opened.set()
        self._wake()
        return channel

    async def _consume(self, channel: AbstractChannel) -> int:
        """Begin to consume; how many messages will come at once."""
        holding = self._held
        consumers: list[tuple[AbstractQueue, str]] = []
        waiting = 0

        async def arrive(incoming: AbstractIncomingMessage) -> None:
            if self._held is holding:
                self._arrive(incoming)

        for level in levels(self.subscription):
            queue = await channel.get_queue(queue_name(self.subscription.name, level), ensure=True)
            prefetch = PREFETCH[int(level)]
            waiting += min(prefetch, queue.declaration_result.message_count or 0)
            await channel.set_qos(prefetch_count=prefetch)
            consumers.append((queue, await queue.consume(arrive)))
        self._consumers, self.resting = consumers, False
        return waiting

    async def _arrivals(self, count: int) -> None:
        """Wait a while for what was in the queues, so that the first pull sees it."""
        try:
            async with asyncio.timeout(ARRIVAL_S):
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
                if not self.resting and not await self._is_consuming():
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

    # What comes.

    def _arrive(self, incoming: AbstractIncomingMessage) -> None:
        carried = decode(incoming)
        held = Held(incoming, carried, next(self._numbers), carried.attempts)
        if not carried.expires and self.subscription.ttl_s:
            carried.expires = max(carried.stored.published, 1.0) + self.subscription.ttl_s
        carried.once = carried.once or self.subscription.exactly_once
        self._held.awaited.pop(carried.stored.message_id, None)
        # Behind those of an ordered subscription that are being asked for, so that nothing overtakes them.
        if self._is_doubtful(held) or (self.subscription.ordered and self._held.checking):
            self._held.checking += 1
            self._chores.put_nowait((self._held, held))
        else:
            self._admit(held)
        self._arrived.set()

    def _is_doubtful(self, held: Held) -> bool:
        """Whether it takes a while to say that this message is to be handed out."""
        return (
            self._must_ask(held)
            or held.identity in self._seen
            or held.identity in self._held.present
            or not held.carried.wanted(self.subscription)
        )

    def _must_ask(self, held: Held) -> bool:
        """Whether only the state knows that this message is over."""
        carried, incoming = held.carried, held.incoming
        if incoming.redelivered or AGAIN in incoming.headers:
            return True
        old = carried.stored.published < self._doubtful_to
        return carried.once and bool(old or carried.copy or carried.attempts)

    def _admit(self, held: Held) -> None:
        self._seen[held.identity] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self._held.admit(held, time.time())
        self._plan(min(held.not_before or math.inf, held.carried.expires or math.inf))
        self._wake()

    async def _do_chores(self) -> None:
        while True:
            holding, held = await self._chores.get()
            some = [held]
            while not self._chores.empty() and len(some) < _CHECKED:
                other, held = self._chores.get_nowait()
                if other is not holding:
                    some.clear()  # their channel is gone, and the broker has them back
                    holding = other
                some.append(held)
            while holding is self._held:
                try:
                    await self._look_into(holding, some)
                    break
                except PlexusError as error:
                    log.warning("messages_stuck", subscription=self.subscription.name, reason=error.reason)
                    await asyncio.sleep(_RETRY_S)
            holding.checking -= len(some)
            self._arrived.set()

    async def _look_into(self, holding: Holding, some: Sequence[Held]) -> None:
        asked = [held for held in some if self._must_ask(held)]
        over: set[int] = set()
        if asked:
            known = await self._settling.settled(self.subscription, [held.carried for held in asked])
            over = {held.number for held, done in zip(asked, known, strict=True) if done}
        dropped = []
        for held in some:
            again = held.identity in holding.present
            seen = held.identity in self._seen and not held.incoming.redelivered
            wanted = held.carried.wanted(self.subscription)
            if again or seen or not wanted or held.number in over:
                dropped.append(held)
            elif holding is self._held:
                self._admit(held)
        await self._tell(holding, dropped)

    # Time.

    def _plan(self, at: float) -> None:
        """See to it that what is due then is done then."""
        if at < self._planned:
            self._timer.set()

    async def _time(self) -> None:
        while True:
            self._timer.clear()
            self._planned = math.inf
            try:
                await self.settle()
            except PlexusError as error:
                log.warning("messages_not_settled", subscription=self.subscription.name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            now = time.time()
            self._planned = min(self._held.next_time(now), now + 60.0)
            await asyncio.sleep(_REST_S)
            try:
                async with asyncio.timeout(max(0.0, self._planned - time.time())):
                    await self._timer.wait()
            except TimeoutError:
                continue

    async def settle(self) -> None:
        """Do what the time asks for: end leases, bring back what waited, give up what waited too long.

        Raises:
            UnavailableError: The state cannot be reached; what was not done is done at the next call.
        """
        holding, now = self._held, time.time()
        if holding.wake(now):
            self._wake()
        work = [self._fail(holding, held, LEASE_EXPIRED, pause_s=0.0) for held in holding.ended(now)]
        work += [self._fail(holding, held, TTL_EXPIRED, dead=True) for held in holding.outlived(now)]
        await self._all(work)

    # What pullers do.

    def expect(self, message_ids: Sequence[str]) -> None:
        """Messages published here that will arrive: a pull that does not wait waits for them."""
        held = self._held
        if self._opened.is_set() and held.count() + len(held.awaited) < PREFETCH[1] // 2:
            held.awaited.update((message_id, next(self._marks)) for message_id in message_ids)

    async def ready(self) -> None:
        """Wait until the consumer is open.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        self.used = time.monotonic()
        try:
            async with asyncio.timeout(_RETRY_MAX_S * 2):
                await self._opened.wait()
                if self.resting:
                    await self._wake_up()
        except (*BROKEN, TimeoutError):
            raise away() from None
        except asyncio.CancelledError:
            if interrupted():
                raise away() from None
            raise

    async def arrivals(self, patience_s: float = ARRIVAL_S) -> None:
        """Wait a moment for what was published here before this call."""
        held, mark = self._held, next(self._marks)
        try:
            async with asyncio.timeout(patience_s):
                while held.checking or next(iter(held.awaited.values()), mark) < mark:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            held.awaited.clear()  # another process has them

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
        now = time.time()
        address = self._address()
        prefix = f"{address}." if address else ""
        deliveries = self._held.lease(self.subscription, max_messages, max_bytes, now, prefix)
        if deliveries:
            self._plan(now + self.subscription.ack_deadline_s)
        return deliveries

    async def _whole(self, work: Coroutine[None, None, Result]) -> Result:
        """Do it to its end, even if the caller goes away: half of it would be one delivery too many."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return await asyncio.shield(task)

    async def _all(self, works: Sequence[Coroutine[None, None, None]]) -> None:
        """Do all of it, one after the other, and then raise the first failure."""

        async def each() -> None:
            failure: PlexusError | None = None
            for work in works:
                try:
                    await work
                except PlexusError as error:
                    failure = failure or error
            if failure is not None:
                raise failure

        if works:
            await self._whole(each())

    async def acknowledge(self, tokens: Sequence[str]) -> list[str]:
        """Be done with messages."""
        return await self._whole(self._acknowledge(tokens))

    async def _acknowledge(self, tokens: Sequence[str]) -> list[str]:
        holding, now = self._held, time.time()
        taken = [(token, holding.take(token, now)) for token in tokens]
        entries = [held for _, held in taken if held is not None]
        try:
            told = await self._finish(holding, entries)
        except PlexusError:
            for token, held in taken:
                if held is not None:
                    self._lend(holding, token, held)
            raise
        # A delivery that the state knows to be over is over, whatever the broker has heard.
        return [token for token, held in taken if held is None or not (told or held.carried.once)]

    def _lend(self, holding: Holding, token: str, held: Held) -> None:
        until = time.time() + self.subscription.ack_deadline_s
        holding.lend(token, held, until)
        self._plan(until)

    async def nack(self, refusals: Sequence[Refusal]) -> list[str]:
        """Take messages back."""
        holding, expired = self._held, []
        work = []
        for refusal in refusals:
            held = holding.take(refusal.ack_id, time.time())
            if held is None:
                expired.append(refusal.ack_id)
                continue
            reason = refusal.reason[:MAX_REASON] or "not acknowledged"
            work.append(self._fail(holding, held, reason, pause_s=refusal.delay_s, dead=refusal.dead))
        await self._all(work)
        return expired

    def extend(self, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end."""
        expired = []
        now = time.time()
        for token, seconds in leases:
            held = self._held.take(token, now)
            if held is None:
                expired.append(token)
            elif seconds > 0:
                self._held.lend(token, held, now + seconds)
                self._plan(now + seconds)
            else:
                self._held.make_ready(held, now)
                self._wake()
        return expired

    async def _fail(
        self, holding: Holding, held: Held, reason: str, *, pause_s: float | None = None, dead: bool = False
    ) -> None:
        """Note a failed attempt; the message comes again or is given up.

        Raises:
            PlexusError: The state cannot be reached; the message is as it was, and out again soon.
        """
        carried, now = held.carried, time.time()
        policy = carried.retry or self.subscription.retry
        attempts = carried.attempts + (reason != TTL_EXPIRED)
        history = [*carried.history, (now, reason)][-MAX_HISTORY:]
        failed = replace(carried, attempts=attempts, history=history)
        gone = dead or attempts >= policy.max_attempts
        pause = policy.pause_s(attempts) if pause_s is None else pause_s
        in_place = pause == 0 or (self.subscription.ordered and carried.stored.ordering_key)
        if in_place and not gone:
            held.carried, held.not_before = failed, now + pause
            self._return(holding, held)
            return
        try:
            if gone:
                await self._settling.bury(self.subscription, failed, reason)
            else:
                await self._settling.defer(self.subscription, failed, now + pause)
        except PlexusError:
            held.not_before = now + _RETRY_S
            self._return(holding, held)
            raise
        while True:
            try:
                await self._finish(holding, [held])
            except PlexusError as error:
                log.warning("message_stuck", subscription=self.subscription.name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                if holding is self._held:
                    continue
            return

    def _return(self, holding: Holding, held: Held) -> None:
        holding.make_ready(held, time.time())
        self._plan(held.not_before)
        self._wake()

    async def _finish(self, holding: Holding, entries: Sequence[Held]) -> bool:
        """Be done with messages; whether the broker has been told.

        Raises:
            PlexusError: The state cannot be reached.
        """
        acks = self._acks if holding is self._held else None
        once = [held.as_arrived() for held in entries if held.carried.once]
        if once:
            await self._settling.finish(self.subscription, once)
        told = await self._tell(holding, entries, acks)
        now = time.time()
        freed = [held for held in entries if holding.release(held, now)]
        if freed:
            self._plan(now)
            self._wake()
        return told

    async def _tell(self, holding: Holding, entries: Sequence[Held], acks: Acks | None = None) -> bool:
        """Acknowledge messages to the broker; false if their channel is gone and it delivers them again."""
        acks = acks or (self._acks if holding is self._held else None)
        if not entries:
            return True
        if acks is None:
            return False
        try:
            await acks.send([held.incoming.delivery_tag or 0 for held in entries])
        except BROKEN:
            return False
        except asyncio.CancelledError:
            if interrupted():
                return False
            raise
        return True

    # What is counted.

    def counts(self) -> tuple[int, int, int]:
        """Ready, leased, waiting for their time."""
        return self._held.counts()

    def messages(self) -> list[Carried]:
        """Everything that is held, in the order in which it came."""
        return [held.carried for held in sorted(self._held.entries())]

    async def change(self, subscription: Subscription) -> None:
        """Use other settings from now on, and be done with what Seek has passed over."""
        before, self.subscription = self.subscription.sought, subscription
        if subscription.sought != before:
            holding = self._held
            past = holding.remove(lambda held: not held.carried.wanted(subscription), time.time())
            await self._tell(holding, past)
            self._wake()

    async def clear(self) -> None:
        """Be done with everything that is held."""
        holding = self._held
        await self._tell(holding, holding.clear())
