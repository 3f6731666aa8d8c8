"""One StreamingPull of a Pub/Sub client.

Unlike a stream of our own, its end returns only what was not sent: clients open streams anew while handlers
run, and settle messages by calls of their own. So what a stream has out is known by acknowledgement ids,
wherever those come.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from google.pubsub_v1.types import pubsub as types

from services.queueing.domain import MAX_BATCH, MAX_DATA_BYTES
from services.queueing.faces import pubsub_convert as convert
from services.queueing.faces.pubsub_names import own
from services.queueing.streaming import gather
from services.runtime.errors import InvalidArgumentError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from services.queueing.domain import Broker, Delivery
    from services.queueing.faces.pubsub_leases import Leases, Settled
    from services.queueing.resources import Subscription

MAX_OUTSTANDING = 10_000
_DEFAULT_BYTES = 256 * 1024 * 1024
_WAIT_S = 20.0
_AHEAD = 4
_RESPONSE = types.StreamingPullResponse.pb()
_KEEPALIVE_VERSION = 1
_ONCE = ("subscription", "client_id", "max_outstanding_messages", "max_outstanding_bytes", "protocol_version")


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
    """Hands out leases within the client's flow control, and does what the client says on the stream."""

    def __init__(
        self, broker: Broker, leases: Leases, outstanding: Outstanding, first: Any, stopping: asyncio.Event
    ) -> None:
        """Read the first request.

        Args:
            broker: Where messages are.
            leases: Of this process.
            outstanding: Of this process.
            first: Names the subscription and the flow control.
            stopping: Set when the server stops; the client is then told to come again.
        """
        self._broker = broker
        self._leases = leases
        self._outstanding = outstanding
        self._stopping = stopping
        self._first = first
        self._name = own(first.subscription, "subscriptions", "subscription")
        self._lease_s = _deadline(first.stream_ack_deadline_seconds)
        # There, not positive is no bound.
        messages, size = first.max_outstanding_messages, first.max_outstanding_bytes
        self._messages = min(messages, MAX_OUTSTANDING) if messages > 0 else MAX_OUTSTANDING
        self._bytes = size if size > 0 else _DEFAULT_BYTES
        self._held: dict[str, tuple[int, float]] = {}
        self._unsent: set[str] = set()
        self._room = asyncio.Event()
        # The client's words are not read while it does not take what it is sent.
        self._out: asyncio.Queue[Any] = asyncio.Queue(maxsize=_AHEAD)
        self._subscription: Subscription | None = None

    def release(self, ack_id: str) -> None:
        """A message is settled."""
        self._held.pop(ack_id, None)
        self._room.set()

    def extend(self, ack_id: str, seconds: float) -> None:
        """A lease ends later."""
        if ack_id in self._held:
            self._held[ack_id] = (self._held[ack_id][0], time.monotonic() + seconds)

    async def responses(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any]:
        """What is sent, until the client has said its last or the server stops.

        Raises:
            PlexusError: The subscription is gone or detached, the client's words are wrong, the server stops.
        """
        await self._refresh()
        yield self._response()
        tasks = [asyncio.create_task(work) for work in (self._read(requests), self._pull(), self._stop())]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            while (item := await self._out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                self._unsent.difference_update(entry.ack_id for entry in item.received_messages)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._outstanding.forget(self._held)
            if self._unsent:
                # Shielded: the stream's own cancellation is the usual way to get here.
                unsent = [(ack_id, 0.0) for ack_id in self._unsent]
                await asyncio.shield(self._broker.extend(self._name, unsent))

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        while self._out.full():
            self._out.get_nowait()  # the leases in it are among the unsent
        self._out.put_nowait(error)

    def _response(self, **fields: Any) -> Any:
        """A response; each tells how the subscription is set, since clients follow the last that came."""
        subscription = self._subscription
        properties = _RESPONSE.SubscriptionProperties(
            exactly_once_delivery_enabled=subscription is not None and subscription.exactly_once,
            message_ordering_enabled=subscription is not None and subscription.ordered,
        )
        return _RESPONSE(subscription_properties=properties, **fields)

    async def _refresh(self) -> Subscription:
        self._subscription = await self._broker.get_subscription(self._name)
        return self._subscription

    async def _stop(self) -> None:
        await self._stopping.wait()
        raise UnavailableError("the server stops", reason="SERVER_STOPPING")

    # What the client says.

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        await self._settle(self._first)
        async for request in requests:
            named = [name for name in _ONCE if getattr(request, name)]
            if named:
                raise InvalidArgumentError("is for the first message only", field=named[0])
            if request.stream_ack_deadline_seconds:
                self._lease_s = _deadline(request.stream_ack_deadline_seconds)
            settles = request.ack_ids or request.modify_deadline_ack_ids
            if settles:
                await self._settle(request)
            elif self._first.protocol_version >= _KEEPALIVE_VERSION:
                # Who says that it knows keepalives opens the stream anew if its own are not answered.
                await self._refresh()
                await self._out.put(self._response())

    async def _settle(self, request: Any) -> None:
        if len(request.modify_deadline_ack_ids) != len(request.modify_deadline_seconds):
            raise InvalidArgumentError("needs one for each id", field="modify_deadline_seconds")
        told = self._subscription is not None and self._subscription.exactly_once
        if request.ack_ids:
            settled = await self._leases.acknowledge(self._name, request.ack_ids)
            if told:
                confirmation = _RESPONSE.AcknowledgeConfirmation(**_fields(settled))
                await self._out.put(self._response(acknowledge_confirmation=confirmation))
        by_deadline: dict[int, list[str]] = {}
        pairs = zip(request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True)
        for ack_id, seconds in pairs:
            by_deadline.setdefault(convert.ack_deadline(seconds), []).append(ack_id)
        for seconds, ack_ids in by_deadline.items():
            settled = await self._leases.modify(self._name, ack_ids, seconds)
            if told:
                modified = _RESPONSE.ModifyAckDeadlineConfirmation(**_fields(settled))
                await self._out.put(self._response(modify_ack_deadline_confirmation=modified))

    # What the client gets.

    async def _pull(self) -> None:
        while True:
            count = self._messages - len(self._held)
            size = self._bytes - sum(size for size, _ in self._held.values())
            if count <= 0 or (size <= 0 and self._held):
                await self._wait()
                continue
            subscription = await self._refresh()
            deliveries = await self._broker.pull(
                self._name,
                max_messages=min(count, MAX_BATCH),
                max_bytes=max(1, min(size, MAX_DATA_BYTES)),
                wait_s=_WAIT_S,
            )
            if deliveries:
                await self._hand_out(deliveries, told=bool(subscription.dead_letter_topic))
                filled = len(deliveries) == count
                await gather(len(deliveries), self._held, self._messages, self._room, filled=filled)

    async def _hand_out(self, deliveries: list[Delivery], *, told: bool) -> None:
        ids = [delivery.ack_id for delivery in deliveries]
        self._unsent.update(ids)
        until = time.monotonic() + self._lease_s
        for delivery in deliveries:
            self._held[delivery.ack_id] = (len(delivery.data), until)
            self._outstanding.add(delivery.ack_id, self)
        await self._broker.extend(self._name, [(ack_id, float(self._lease_s)) for ack_id in ids])
        messages = [convert.received(delivery, with_attempt=told) for delivery in deliveries]
        for part in convert.parts(messages):
            await self._out.put(self._response(received_messages=part))

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


def _fields(settled: Settled) -> dict[str, list[str]]:
    return {
        "ack_ids": settled.done,
        "invalid_ack_ids": settled.invalid,
        "temporary_failed_ack_ids": settled.failed,
    }


def _deadline(seconds: int) -> int:
    if not convert.MIN_DEADLINE_S <= seconds <= convert.MAX_DEADLINE_S:
        raise InvalidArgumentError("must be 10 to 600", field="stream_ack_deadline_seconds")
    return seconds
