"""Consuming a subscription: leases extended while handlers run, results acknowledged, streams renewed."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from plexus.queueing.v1 import queueing_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from plexus.queueing.v1 import queueing_pb2_grpc

_RETRY_MIN_S, _RETRY_MAX_S = 0.1, 5.0
_STREAM_S = 24 * 3600.0


class RejectError(Exception):
    """Raised by a handler for a message that must not be tried again: it goes to the dead letters."""


async def consume(
    stub: queueing_pb2_grpc.QueueingServiceStub,
    subscription: str,
    handler: Callable[[queueing_pb2.Delivery], Awaitable[None]],
    *,
    concurrency: int = 16,
    lease_s: float = 30.0,
    on_error: Callable[[Exception], None] = lambda _error: None,
) -> None:
    """Handle the messages of a subscription until cancelled.

    A handler that returns acknowledges its message; one that raises returns it to the subscription's retry
    policy with the error's text as the reason; RejectError sends it to the dead letters. When the stream
    breaks the handlers are cancelled, since their messages are already free again, and a new stream is opened
    with back-off and jitter.

    Args:
        stub: A QueueingService stub.
        subscription: Its name.
        handler: Called with each message.
        concurrency: Messages handled at once.
        lease_s: Length of a lease; extended at half of it for as long as the handler runs.
        on_error: Told of each broken stream and failed handler.
    """
    failures = 0
    while True:
        session = _Session(stub, subscription, handler, concurrency, lease_s, on_error)
        try:
            await session.run()
        except grpc.aio.AioRpcError as error:
            on_error(error)
        failures = 0 if session.delivered else failures + 1
        pause = min(_RETRY_MAX_S, _RETRY_MIN_S * 2**failures)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only


class _Session:
    """One stream and the handlers of what came on it."""

    def __init__(
        self,
        stub: queueing_pb2_grpc.QueueingServiceStub,
        subscription: str,
        handler: Callable[[queueing_pb2.Delivery], Awaitable[None]],
        concurrency: int,
        lease_s: float,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._stub = stub
        self._subscription = subscription
        self._handler = handler
        self._concurrency = concurrency
        self._lease_s = lease_s
        self._on_error = on_error
        # As many answers as messages can be held, each with one extension in flight: never full for long.
        self._answers: asyncio.Queue[queueing_pb2.StreamingPullRequest] = asyncio.Queue(4 * concurrency)
        self._handlers: dict[str, asyncio.Task[None]] = {}
        self.delivered = False

    async def _requests(self) -> AsyncIterator[queueing_pb2.StreamingPullRequest]:
        yield queueing_pb2.StreamingPullRequest(
            subscription=self._subscription, max_outstanding_messages=self._concurrency
        )
        while True:
            yield await self._answers.get()

    async def run(self) -> None:
        """Handle what comes until the stream ends."""
        call = self._stub.StreamingPull(self._requests(), timeout=_STREAM_S)
        try:
            async for response in call:
                for ack_id in response.expired:
                    if ack_id in self._handlers:
                        self._handlers[ack_id].cancel()
                for delivery in response.deliveries:
                    self.delivered = True
                    self._handlers[delivery.ack_id] = asyncio.create_task(self._handle(delivery))
        finally:
            call.cancel()
            running = list(self._handlers.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _handle(self, delivery: queueing_pb2.Delivery) -> None:
        extension = asyncio.create_task(self._extend(delivery.ack_id))
        answer = queueing_pb2.StreamingPullRequest()
        try:
            await self._handler(delivery)
            answer.acknowledge.append(delivery.ack_id)
        except Exception as error:  # noqa: BLE001 - any failure of the handler is the message's
            self._on_error(error)
            reason = f"{type(error).__name__}: {error}"
            dead = isinstance(error, RejectError)
            answer.nack.append(
                queueing_pb2.Refusal(ack_id=delivery.ack_id, reason=str(error) if dead else reason, dead=dead)
            )
        finally:
            extension.cancel()
            self._handlers.pop(delivery.ack_id, None)
        await self._answers.put(answer)

    async def _extend(self, ack_id: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 2)
            extension = queueing_pb2.Extension(ack_id=ack_id)
            extension.deadline.FromMilliseconds(round(self._lease_s * 1000))
            await self._answers.put(queueing_pb2.StreamingPullRequest(extend=[extension]))
