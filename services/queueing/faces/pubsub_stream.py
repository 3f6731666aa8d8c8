"""One StreamingPull of a Pub/Sub client.

Unlike a stream of our own, its end returns nothing: clients open streams anew while handlers run, and settle
messages by calls of their own. So what a stream has out is known by acknowledgement ids, wherever those come.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from services.queueing.domain import MAX_BATCH, MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from services.queueing.domain import Broker, Delivery

MAX_OUTSTANDING = 10_000
_DEFAULT_BYTES = 256 * 1024 * 1024
_WAIT_S = 20.0


class Outstanding:
    """Which stream has which messages out, over all streams of this process."""

    def __init__(self) -> None:
        self._streams: dict[str, PullStream] = {}

    def add(self, ack_id: str, stream: PullStream) -> None:
        """Note a message."""
        self._streams[ack_id] = stream

    def settled(self, ack_ids: Iterable[str]) -> None:
        """Messages that were acknowledged or given back."""
        for ack_id in ack_ids:
            stream = self._streams.pop(ack_id, None)
            if stream is not None:
                stream.release(ack_id)

    def extended(self, ack_ids: Iterable[str], seconds: float) -> None:
        """Messages whose leases end later."""
        for ack_id in ack_ids:
            stream = self._streams.get(ack_id)
            if stream is not None:
                stream.extend(ack_id, seconds)

    def forget(self, ack_ids: Iterable[str]) -> None:
        """Messages of a stream that ended."""
        for ack_id in ack_ids:
            self._streams.pop(ack_id, None)


class PullStream:
    """Hands out leases within the client's flow control."""

    def __init__(
        self,
        broker: Broker,
        outstanding: Outstanding,
        subscription: str,
        *,
        lease_s: float,
        messages: int,
        content_bytes: int,
    ) -> None:
        self._broker = broker
        self._outstanding = outstanding
        self._subscription = subscription
        self._lease_s = lease_s
        # There, not positive is no bound.
        self._messages = min(messages, MAX_OUTSTANDING) if messages > 0 else MAX_OUTSTANDING
        self._bytes = content_bytes if content_bytes > 0 else _DEFAULT_BYTES
        self._held: dict[str, tuple[int, float]] = {}
        self._room = asyncio.Event()

    def release(self, ack_id: str) -> None:
        """A message is settled."""
        self._held.pop(ack_id, None)
        self._room.set()

    def extend(self, ack_id: str, seconds: float) -> None:
        """A lease ends later."""
        if ack_id in self._held:
            self._held[ack_id] = (self._held[ack_id][0], time.monotonic() + seconds)

    def set_lease(self, seconds: float) -> None:
        """The client changed how long it has messages."""
        self._lease_s = seconds

    async def batches(self) -> AsyncGenerator[list[Delivery]]:
        """Messages, for ever."""
        try:
            while True:
                count = self._messages - len(self._held)
                size = self._bytes - sum(size for size, _ in self._held.values())
                if count <= 0 or (size <= 0 and self._held):
                    await self._wait()
                    continue
                deliveries = await self._broker.pull(
                    self._subscription,
                    max_messages=min(count, MAX_BATCH),
                    max_bytes=max(1, min(size, MAX_DATA_BYTES)),
                    wait_s=_WAIT_S,
                )
                if not deliveries:
                    continue
                ids = [delivery.ack_id for delivery in deliveries]
                await self._broker.extend(self._subscription, [(ack_id, self._lease_s) for ack_id in ids])
                until = time.monotonic() + self._lease_s
                for delivery in deliveries:
                    self._held[delivery.ack_id] = (len(delivery.data), until)
                    self._outstanding.add(delivery.ack_id, self)
                yield deliveries
        finally:
            self._outstanding.forget(self._held)

    async def _wait(self) -> None:
        """Until a message is settled or a lease ends."""
        self._room.clear()
        earliest = min(until for _, until in self._held.values())
        try:
            async with asyncio.timeout(max(0.0, earliest - time.monotonic())):
                await self._room.wait()
        except TimeoutError:
            now = time.monotonic()
            over = [ack_id for ack_id, (_, until) in self._held.items() if until <= now]
            self._outstanding.settled(over)
