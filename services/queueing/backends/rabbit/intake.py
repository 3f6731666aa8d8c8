"""A window's consumer at the broker: opened, watched, and opened again when it is gone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

import structlog

from services.queueing.backends.rabbit.acks import Acks
from services.queueing.backends.rabbit.link import BROKEN, away, interrupted
from services.queueing.backends.rabbit.session import Session
from services.queueing.backends.rabbit.topology import levels, queue_name
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aio_pika.abc import AbstractChannel
    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.session import Current, Settling

log = structlog.get_logger(__name__)

PREFETCH = {3: 250, 2: 250, 1: 1000, 0: 250}
"""Messages that the broker delivers ahead, by priority, of a subscription that is not ordered."""
ARRIVAL_S = 2.0
"""How long a pull waits for what was published in this process before."""
_RETRY_S = 0.2
_RETRY_MAX_S = 5.0
_WATCH_S = 5.0
_PROBE_S = 30.0
"""How long the broker may take to say who consumes: a busy one is no reason to begin anew."""


class Intake:
    """Keeps a session open; `run` is its life, which ends when the subscription is deleted."""

    def __init__(
        self,
        current: Current,
        link: Link,
        settling: Settling,
        begin: Callable[[Session], Awaitable[None]],
        arrive: Callable[[Session, DeliveredMessage], None],
        changed: Callable[[], None],
        *,
        room: int,
    ) -> None:
        """Set it up.

        Args:
            current: Whose session is kept.
            link: To RabbitMQ.
            settling: Makes the queues.
            begin: Called with a session that nothing has come over yet.
            arrive: Called with each message that comes and the session that it belongs to.
            changed: Called when a session has been opened, or there will be none any more.
            room: Messages that the broker delivers ahead, of an ordered subscription.
        """
        self.closed = False
        self.resting = False
        self._current = current
        self._link = link
        self._settling = settling
        self._begin = begin
        self._arrive = arrive
        self._changed = changed
        self._room = room
        self._opened = asyncio.Event()
        self._turning = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._tags: list[str] = []
        self._heard = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a session, or there will be none any more."""
        return self._opened.is_set()

    async def ready(self) -> None:
        """Wait until the consumer is open.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
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

    async def run(self) -> None:
        """Keep it open."""
        pause = _RETRY_S
        while True:
            try:
                channel = await self._open()
                pause = _RETRY_S
                await self._watch(channel)
            except NotFoundError:
                await self.close()
                self._changed()
                return
            except (*BROKEN, PlexusError, TimeoutError) as error:
                name = self._current.subscription.name
                log.warning("window_lost", subscription=name, error=type(error).__name__)
            except asyncio.CancelledError:
                if not interrupted():
                    raise
            self._opened.clear()
            await self._shut()
            await asyncio.sleep(pause)
            pause = min(_RETRY_MAX_S, pause * 2)

    async def close(self) -> None:
        """End; the broker has everything unsettled back."""
        self.closed = True
        self._opened.set()
        await self._shut()

    async def _shut(self) -> None:
        self._current.session.end()
        self._current.session = Session(ordered=self._current.subscription.ordered)
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

    # A consumer for each of the subscription's queues.

    async def _open(self) -> AbstractChannel:
        await self._settling.declare(self._current.subscription)
        channel = await self._link.channel()
        acks = Acks(await channel.get_underlay_channel())
        self._current.session = Session(ordered=self._current.subscription.ordered, acks=acks)
        self._channel = channel
        await self._begin(self._current.session)
        await self._arrivals(await self._consume(channel))
        self._opened.set()
        self._changed()
        return channel

    async def _consume(self, opened: AbstractChannel) -> int:
        """Begin to consume; how many messages will come at once.

        By aiormq's channel: what aio-pika puts around each message costs as much as all else that is done
        with it here.
        """
        channel = cast("Channel", await opened.get_underlay_channel())
        session = self._current.session
        tags: list[str] = []
        waiting = 0

        async def take(incoming: DeliveredMessage) -> None:
            if self._current.session is session:
                self._heard = time.monotonic()
                self._arrive(session, incoming)

        for level in levels(self._current.subscription):
            name = queue_name(self._current.subscription.name, level)
            declared = await channel.queue_declare(name, passive=True)
            prefetch = self._room if self._current.subscription.ordered else PREFETCH[int(level)]
            waiting += min(prefetch, declared.message_count or 0)
            await channel.basic_qos(prefetch_count=prefetch)
            consuming = await channel.basic_consume(name, take)
            tags.append(consuming.consumer_tag or "")
        self._tags, self.resting = tags, False
        return waiting

    async def _arrivals(self, count: int) -> None:
        """Wait a while for what was in the queues, so that the first pull sees it."""
        session = self._current.session
        try:
            async with asyncio.timeout(ARRIVAL_S):
                while session.out < count:
                    session.arrived.clear()
                    await session.arrived.wait()
        except TimeoutError:
            return  # another process took it

    # While nobody asks.

    async def rest(self) -> None:
        """Give back what nobody has asked for, and take nothing more until somebody asks.

        Else it would be kept from the consumers of other replicas. Not for ordered subscriptions: what is
        given back so comes out of order.
        """
        async with self._turning:
            session, channel = self._current.session, self._channel
            if self.resting or not self.is_open or self._current.subscription.ordered or channel is None:
                return
            self.resting = True
            underlay = cast("Channel", await channel.get_underlay_channel())
            for tag in self._tags:
                await underlay.basic_cancel(tag)
            await session.give_back(session.holding.surplus())

    async def _wake_up(self) -> None:
        async with self._turning:
            channel = self._channel
            if self.resting and channel is not None and not channel.is_closed:
                session = self._current.session
                session.holding.awaited.clear()
                before = session.out
                await self._arrivals(before + await self._consume(channel))

    # Whether it is still there.

    async def _watch(self, channel: AbstractChannel) -> None:
        """Return when the consumer is gone: with its channel, or in silence."""
        closed = asyncio.Event()
        channel.close_callbacks.add(lambda *_: closed.set())
        while not channel.is_closed:
            try:
                async with asyncio.timeout(_WATCH_S):
                    await closed.wait()
            except TimeoutError:
                hears = time.monotonic() < self._heard + _WATCH_S
                if not (hears or self.resting or await self._is_consuming()):
                    log.warning("consumer_missing", subscription=self._current.subscription.name)
                    return

    async def _is_consuming(self) -> bool:
        """Ask the broker, since a cancelled consumer shows nowhere in the client."""
        probe = await self._link.channel()
        try:
            async with asyncio.timeout(_PROBE_S):
                for level in levels(self._current.subscription):
                    name = queue_name(self._current.subscription.name, level)
                    queue = await probe.get_queue(name, ensure=True)
                    if not queue.declaration_result.consumer_count:
                        return False
                return True
        finally:
            if not probe.is_closed:
                await probe.close()
