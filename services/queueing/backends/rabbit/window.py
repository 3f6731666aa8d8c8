"""A subscription's consumer in this process: messages come in, are leased, and settled.

RabbitMQ knows only that a message is out; leases, attempts, order within a key and priority between queues
are kept here, and lost with the connection: then the broker delivers everything unsettled again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.admission import Admission
from services.queueing.backends.rabbit.alarm import Alarm
from services.queueing.backends.rabbit.aside import Aside
from services.queueing.backends.rabbit.intake import ARRIVAL_S, PREFETCH, Intake
from services.queueing.backends.rabbit.link import end
from services.queueing.backends.rabbit.session import Current, Session
from services.queueing.backends.rabbit.settlement import Settlement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.session import Settling
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Delivery, Refusal, Stats
    from services.queueing.resources import Priority, Subscription


class Window:
    """One subscription's consumer; runs from `open` to `close`."""

    def __init__(
        self,
        subscription: Subscription,
        link: Link,
        settling: Settling,
        *,
        shared: bool = False,
        room: int = 1000,
        most: int = 100_000,
        address: Callable[[], str] = str,
    ) -> None:
        """Set it up; nothing runs yet.

        Args:
            subscription: What to consume; replaced when its settings change.
            link: To RabbitMQ.
            settling: Where messages go from here.
            shared: Whether other processes consume the same subscription.
            room: Messages of an ordered subscription that the broker delivers ahead.
            most: Messages of it that may wait in the state, since their keys stand still.
            address: Of this process among them, which the ids of its leases begin with.
        """
        self.used = time.monotonic()
        self._askers = 0
        self._address = address
        self._marks = itertools.count()
        self._current = Current(subscription, Session(ordered=subscription.ordered))
        self._alarm = Alarm()
        self._aside = Aside(self._current, settling, self._alarm, room=room, most=most)
        self._admission = Admission(self._current, settling, self._aside, self._alarm, shared=shared)
        self._settlement = Settlement(self._current, settling, self._alarm)
        self._intake = Intake(
            self._current,
            link,
            settling,
            self._aside.begin,
            self._admission.arrive,
            self._alarm.wake,
            room=room,
        )
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Begin."""
        name = self.subscription.name
        time_work = self._alarm.run(name, self.settle, self._next_time)
        for work in (self._intake.run(), time_work, self._admission.run(), self._aside.run()):
            self._tasks.append(asyncio.create_task(work, name=f"window-{name}"))

    async def close(self) -> None:
        """End; the broker has everything unsettled back."""
        self._intake.closed = True
        await end(self._tasks)
        await self._intake.close()
        await self._settlement.close()
        self._alarm.wake()

    def _next_time(self, now: float) -> float:
        return min(self._session.holding.next_time(now), self._aside.next_time(now))

    @property
    def subscription(self) -> Subscription:
        """As it is now."""
        return self._current.subscription

    @property
    def _session(self) -> Session:
        return self._current.session

    @property
    def closed(self) -> bool:
        """Whether nothing comes any more."""
        return self._intake.closed

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
        return bool(self._session.holding.counts()[1])

    async def rest(self) -> None:
        """Give back what nobody has asked for, and take nothing more until somebody asks."""
        await self._intake.rest()

    # What pullers do.

    def expect(self, message_ids: Sequence[str]) -> None:
        """Messages published here that will arrive: a pull that does not wait waits for them."""
        session, holding = self._session, self._session.holding
        if self._intake.is_open and session.out + len(holding.awaited) < PREFETCH[1] // 2:
            holding.awaited.update((message_id, next(self._marks)) for message_id in message_ids)

    async def ready(self) -> None:
        """Wait until the consumer is open.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        self.used = time.monotonic()
        await self._intake.ready()

    async def arrivals(self, patience_s: float = ARRIVAL_S) -> None:
        """Wait a moment for what was published here before this call."""
        session, mark = self._session, next(self._marks)
        holding = session.holding
        try:
            async with asyncio.timeout(patience_s):
                while holding.checking or next(iter(holding.awaited.values()), mark) < mark:
                    session.arrived.clear()
                    await session.arrived.wait()
        except TimeoutError:
            holding.awaited.clear()  # another process has them

    def news(self) -> asyncio.Event:
        """Set when something becomes ready."""
        return self._alarm.news()

    def lease(self, max_messages: int, max_bytes: int) -> list[Delivery]:
        """Hand out what is ready."""
        self.used = time.monotonic()
        now = time.time()
        address = self._address()
        prefix = f"{address}." if address else ""
        deliveries = self._session.holding.lease(self.subscription, max_messages, max_bytes, now, prefix)
        if deliveries:
            self._alarm.plan(min(now + self.subscription.ack_deadline_s, self._aside.next_time(now)))
            if self._session.holding.busy:  # there is room for more
                self._current.errands.set()
        return deliveries

    async def acknowledge(self, tokens: Sequence[str]) -> list[str]:
        """Be done with messages; returns the ids whose lease had ended."""
        return await self._settlement.acknowledge(tokens)

    async def nack(self, refusals: Sequence[Refusal]) -> list[str]:
        """Take messages back; returns the ids whose lease had ended."""
        return await self._settlement.nack(refusals)

    def extend(self, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end; returns the ids whose lease had ended."""
        return self._settlement.extend(leases)

    async def settle(self) -> None:
        """Do what the time asks for.

        Raises:
            UnavailableError: The state cannot be reached; what was not done is done at the next call.
        """
        self._aside.look(time.time())
        await self._settlement.settle()

    # What is counted.

    def counts(self) -> tuple[int, int, int]:
        """Ready, leased, waiting for their time."""
        return self._session.holding.counts()

    def past_seek(self) -> list[Priority]:
        """Queues with nothing any more that Seek has passed over: what came last was put there after it."""
        sought = max((at for _, at in self.subscription.sought), default=0.0)
        return [level for level, entered in self._session.entered.items() if entered > sought]

    def added_to(self, elsewhere: Stats) -> Stats:
        """Counts with those of here; the oldest is of here, where the first of a queue are."""
        ready, leased, waiting = self.counts()
        times = [held.carried.stored.published for held in self._session.holding.entries()]
        return replace(
            elsewhere,
            ready=elsewhere.ready + ready,
            leased=leased,
            delayed=elsewhere.delayed + waiting,
            oldest=min(times, default=0.0),
        )

    def messages(self) -> list[Carried]:
        """Everything that is held, in the order in which it came, but what only the state has whole."""
        return [held.carried for held in sorted(self._session.holding.entries()) if not held.thin]

    async def change(self, subscription: Subscription) -> None:
        """Use other settings from now on, and be done with what Seek has passed over."""
        before, self._current.subscription = self.subscription.sought, subscription
        if subscription.sought != before:
            async with self._aside.working():
                session = self._session
                past = session.holding.remove(lambda held: held.is_past(subscription), time.time())
                await session.tell(past)
            self._current.errands.set()
            self._alarm.wake()

    async def clear(self) -> None:
        """Be done with everything that is held; what the state has of it is to be dropped after this."""
        async with self._aside.working():
            session = self._session
            await session.tell(session.holding.clear())
