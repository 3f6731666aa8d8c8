"""Publishing that is sure, or says that it is not."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

import aio_pika
from aiormq.abc import ChannelFrame

from services.queueing.backends.rabbit.confirmations import Confirmations
from services.queueing.backends.rabbit.frames import frames
from services.queueing.backends.rabbit.link import BROKEN, away, interrupted
from services.queueing.backends.rabbit.topology import DEAD, EXCHANGES, UNCLAIMED
from services.queueing.backends.rabbit.wire import AGAIN
from services.runtime.errors import PlexusError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.channel import Channel

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.wire import Packet

_RETRY_S = 0.2


class Publisher:
    """Publishes with confirms on one channel, trying again until a deadline."""

    def __init__(self, link: Link, *, deadline_s: float) -> None:
        """Set it up; the channel is opened when it is needed.

        Args:
            link: The connection, which nobody consumes from.
            deadline_s: How long a publish may take.
        """
        self._link = link
        self._deadline_s = deadline_s
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()

    async def _ready(self) -> Channel:
        if self._channel is not None and not self._channel.is_closed:
            return self._channel
        async with self._lock:
            if self._channel is None or self._channel.is_closed:
                opened = await self._link.channel(confirms=True)
                for name, kind in EXCHANGES.items():
                    await opened.declare_exchange(name, aio_pika.ExchangeType(kind), durable=True)
                unclaimed = await opened.declare_queue(
                    UNCLAIMED, durable=True, arguments={"x-queue-type": "quorum"}
                )
                await unclaimed.bind(DEAD, "")
                self._channel = cast("Channel", await opened.get_underlay_channel())
        return self._channel

    async def prepare(self) -> None:
        """Declare what exists before the first subscription.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        try:
            await self._ready()
        except BROKEN as error:
            raise away() from error

    async def publish(self, exchange: str, packets: Sequence[tuple[str, Packet]]) -> list[bool]:
        """Publish pairs of routing key and message, in order; for each, whether a queue has it.

        A message whose confirmation did not come is published again with the same id until the deadline.

        Raises:
            UnavailableError: The broker cannot be reached; some messages may have been stored.
            ResourceExhaustedError: The broker takes no messages now: its memory or disk is short, or it is
                overloaded. Some may be stored later.
        """
        deadline = time.monotonic() + self._deadline_s
        routed = [False] * len(packets)
        left = list(range(len(packets)))
        while left:
            failure: PlexusError = away()
            confirmations: Confirmations | None = None
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    confirmations = await self._write(exchange, [packets[number] for number in left])
            except TimeoutError:
                raise _blocked(self._link.blocked) from None
            except UnavailableError as error:
                failure = error
            except BROKEN:
                pass  # for `failure`, if there is no time left
            except asyncio.CancelledError:
                if not interrupted():
                    raise
            if confirmations is not None:
                left = await self._confirmed(left, confirmations, routed, deadline)
            if left:
                await self._before_again([packets[number][1] for number in left], deadline, failure)
        return routed

    @staticmethod
    async def _before_again(packets: Sequence[Packet], deadline: float, failure: PlexusError) -> None:
        if time.monotonic() + _RETRY_S > deadline:
            raise failure
        for packet in packets:
            packet.headers[AGAIN] = 1  # it may be there, unconfirmed
        await asyncio.sleep(_RETRY_S)

    async def _write(self, exchange: str, packets: Sequence[tuple[str, Packet]]) -> Confirmations:
        """Send messages in one piece.

        aiormq's own `basic_publish` takes a task, two locks, a flush and a future for each message, which is
        most of what a publish costs.
        """
        channel = await self._ready()
        payload = frames(exchange, packets, channel.number, channel.max_content_size)
        written = ChannelFrame(payload=payload, should_close=False)
        async with channel.lock:
            # Numbered in the order of writing; nothing comes between the two lines but others' waiting.
            await channel.write_queue.put(written)
            return Confirmations(channel, [packet.message_id for _, packet in packets])

    async def _confirmed(
        self, numbers: Sequence[int], confirmations: Confirmations, routed: list[bool], deadline: float
    ) -> list[int]:
        """Note what has been confirmed; which are to be published again."""
        try:
            _, waiting = await asyncio.wait(
                [confirmations.done], timeout=max(0.0, deadline - time.monotonic())
            )
        finally:
            confirmations.end()
        if waiting:
            raise _blocked(self._link.blocked)
        failed = []
        for number, found in zip(numbers, confirmations.routed(), strict=True):
            if found is None:
                failed.append(number)
            else:
                routed[number] = found
        return failed


def _blocked(why: str) -> ResourceExhaustedError:
    told = why or "its memory or disk is short, or it is overloaded"
    return ResourceExhaustedError(
        f"RabbitMQ takes no messages now: {told}",
        reason="BROKER_BLOCKED",
        metadata={"broker_reason": why} if why else None,
        retry_after_s=5,
    )
