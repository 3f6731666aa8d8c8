"""Consuming a subscription: leases renewed while handlers run, results acknowledged, streams renewed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio

from plexus.client.failures import problem
from plexus.client.propagation import TRACEPARENT, CallContext, call_context
from plexus.client.retrying import TRANSIENT, pause_s
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import TracebackType

    from plexus.queueing.v1 import queueing_pb2_grpc

    Handler = Callable[[pb.Delivery], Awaitable[None]]

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024 * 1024
DRAIN_S = 30.0
_STREAM_S = 24 * 3600.0
_CLOSE_S = 5.0
_ANSWERS = 1000
"""Of each kind in one request."""
_IN_USE = "SUBSCRIPTION_IN_USE"


class RejectError(Exception):
    """Raised by a handler for a message that must not be tried again: it goes to the dead letters."""


class RetryLaterError(Exception):
    """Raised by a handler for a message that is to come again after `delay_s` seconds."""

    def __init__(self, reason: str, *, delay_s: float) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


@dataclass(slots=True, eq=False)
class _Held:
    """A message that is handled here, and its leases.

    None when they are lost, and it comes again; two when it came again before that was known.
    """

    delivery: pb.Delivery
    ack_ids: set[str]
    task: asyncio.Task[pb.Refusal | None]


@dataclass(slots=True)
class _Answers:
    """What is to be said on the stream. There is never more than what is held, so it needs no bound."""

    acknowledge: deque[str] = field(default_factory=deque)
    nack: deque[pb.Refusal] = field(default_factory=deque)
    extend: dict[str, float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self) -> pb.StreamingPullRequest | None:
        """The next request; None if there is nothing to say."""
        if not (self.acknowledge or self.nack or self.extend):
            return None
        request = pb.StreamingPullRequest()
        for kind in ("acknowledge", "nack"):
            waiting = getattr(self, kind)
            getattr(request, kind).extend(waiting.popleft() for _ in range(min(_ANSWERS, len(waiting))))
        for ack_id in list(islice(self.extend, _ANSWERS)):
            extension = request.extend.add(ack_id=ack_id)
            extension.deadline.FromMilliseconds(round(self.extend.pop(ack_id) * 1000))
        return request


class Subscriber:
    """Handles the messages of a subscription; `run` it, or use it with `async with`, which drains at the end.

    A handler that returns acknowledges its message; one that raises returns it to the subscription's retry
    policy with the error as the reason; RejectError sends it to the dead letters, RetryLaterError says when
    it is to come again. Its lease is renewed for as long as the handler runs. Messages with the same ordering
    key of an ordered subscription are handled one after the other.

    A handler is never interrupted because a stream broke: the stream is opened again, with back-off, and if
    the message comes again meanwhile, it is taken for the one being handled. It may be handled elsewhere too.
    Calls that it makes belong to the trace that the message carries.

        async with plexus.client.Subscriber(queueing, "billing", handle, concurrency=16) as subscriber:
            await subscriber.ended()
    """

    def __init__(
        self,
        stub: queueing_pb2_grpc.QueueingServiceStub,
        subscription: str,
        handler: Handler,
        *,
        concurrency: int = 16,
        max_bytes: int = MAX_BYTES,
        drain_s: float = DRAIN_S,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Set it up.

        Args:
            stub: A QueueingService stub.
            subscription: Its name.
            handler: Called with each message.
            concurrency: Messages held and handled at once, 1 to 10,000.
            max_bytes: Content held at once; one message is always taken.
            drain_s: How long running handlers may go on after `drain`.
            on_error: Told of each broken stream and failed handler. Default: they are logged.
        """
        self._stub = stub
        self._subscription = subscription
        self._handler = handler
        self._concurrency = concurrency
        self._max_bytes = max_bytes
        self._drain_s = drain_s
        self._on_error = on_error or self._log
        self._slots = asyncio.Semaphore(concurrency)
        self._answers = _Answers()
        self._held: dict[str, _Held] = {}  # by message id
        self._leases: dict[str, _Held] = {}  # by ack id
        self._tails: dict[
            str, asyncio.Task[pb.Refusal | None]
        ] = {}  # by ordering key: the last one to be handled
        self._ordered = False
        self._draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._delivered = False
        self._generation = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin."""
        self._task = asyncio.create_task(self.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain; a cancelled program gives everything back at once."""
        if self._task is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            self._task.cancel()
        self.drain()
        try:
            await asyncio.wait([self._task])
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if kind is None and not self._task.cancelled():
            self._task.result()

    async def ended(self) -> None:
        """Wait until it ends: after `drain`, or because the service refused it.

        Raises:
            grpc.RpcError: The refusal, such as NOT_FOUND for the subscription.
        """
        if self._task is not None:
            await asyncio.shield(self._task)

    def drain(self) -> None:
        """Take nothing more; `run` ends when the handlers have, or gives back the rest after `drain_s`."""
        self._draining.set()
        self._answers.news.set()

    async def run(self) -> None:
        """Handle messages until drained. When it is cancelled, handlers are too, and their messages are free.

        Raises:
            grpc.RpcError: The service refused it for a reason that does not pass, such as NOT_FOUND.
        """
        streams = asyncio.create_task(self._streams())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([streams, draining], return_when=asyncio.FIRST_COMPLETED)
            if self._draining.is_set():
                await self._finish(streams)
            if streams.done():
                streams.result()
        finally:
            tasks = [held.task for held in self._held.values()]
            for task in (streams, draining, *tasks):
                task.cancel()
            await asyncio.gather(streams, draining, *tasks, return_exceptions=True)

    async def _finish(self, streams: asyncio.Task[None]) -> None:
        """Let handlers end, give back the others, and close the stream when that is said."""
        try:
            async with asyncio.timeout(self._drain_s):
                await self._empty.wait()
        except TimeoutError:
            for held in self._held.values():
                held.task.cancel()
        await asyncio.wait([streams], timeout=_CLOSE_S)

    # Streams.

    async def _streams(self) -> None:
        failures = 0
        while True:
            self._delivered = False
            try:
                await self._stream()
            except grpc.aio.AioRpcError as error:
                found = problem(error)
                if found.code not in TRANSIENT and found.reason != _IN_USE:
                    raise
                self._on_error(error)
            if self._draining.is_set() and self._empty.is_set():
                return
            failures = 1 if self._delivered else failures + 1
            await asyncio.sleep(pause_s(failures))

    async def _stream(self) -> None:
        request = pb.GetSubscriptionRequest(subscription=self._subscription)
        settings = await self._stub.GetSubscription(request)
        self._ordered = settings.ordered
        call = self._stub.StreamingPull(self._requests(self._generation), timeout=_STREAM_S)
        lease_s = settings.ack_deadline.ToMilliseconds() / 1000
        renewing = asyncio.create_task(self._renew(lease_s))
        try:
            async for response in call:
                for ack_id in response.expired:
                    if ack_id in self._leases:
                        self._leases.pop(ack_id).ack_ids.discard(ack_id)
                for delivery in response.deliveries:
                    self._take(delivery)
        finally:
            self._generation += 1  # gRPC may go on asking for requests of a stream that broke
            call.cancel()
            renewing.cancel()

    async def _requests(self, generation: int) -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(
            subscription=self._subscription,
            max_outstanding_messages=self._concurrency,
            max_outstanding_bytes=self._max_bytes,
            drain=self._draining.is_set(),
        )
        told = self._draining.is_set()
        while self._generation == generation:
            if self._draining.is_set() and not told:
                told = True
                yield pb.StreamingPullRequest(drain=True)
            request = self._answers.request()
            if request is not None:
                yield request
            elif told and self._empty.is_set():
                return  # the service takes what was said, and ends the stream
            else:
                self._answers.news.clear()
                await self._answers.news.wait()

    async def _renew(self, lease_s: float) -> None:
        while True:  # at once: a stream before this one may have been away for long
            self._answers.extend.update(dict.fromkeys(self._leases, lease_s))
            self._answers.news.set()
            await asyncio.sleep(lease_s / 3)

    # Messages.

    def _take(self, delivery: pb.Delivery) -> None:
        self._delivered = True
        held = self._held.get(delivery.message_id)
        if held is not None:  # its lease had ended, perhaps with a stream
            held.ack_ids.add(delivery.ack_id)
            self._leases[delivery.ack_id] = held
            return
        if self._draining.is_set():
            self._give_back(delivery.ack_id)
            return
        key = delivery.ordering_key if self._ordered else ""
        task = asyncio.create_task(self._work(delivery, self._tails.get(key)))
        held = self._held[delivery.message_id] = _Held(delivery, {delivery.ack_id}, task)
        self._leases[delivery.ack_id] = held
        self._empty.clear()
        if key:
            self._tails[key] = task
        task.add_done_callback(lambda task: self._done(held, key, task))

    async def _work(
        self, delivery: pb.Delivery, before: asyncio.Task[pb.Refusal | None] | None
    ) -> pb.Refusal | None:
        if before is not None:
            await asyncio.wait([before])
        async with self._slots:
            return await self._handle(delivery)

    def _done(self, held: _Held, key: str, task: asyncio.Task[pb.Refusal | None]) -> None:
        """Say what became of a message: done, refused, or given back by who cancelled its handler."""
        for ack_id in held.ack_ids:
            del self._leases[ack_id]
            self._answers.extend.pop(ack_id, None)
            if task.cancelled():
                self._give_back(ack_id)
            elif (refusal := task.result()) is None:
                self._answers.acknowledge.append(ack_id)
            else:
                told = pb.Refusal()
                told.CopyFrom(refusal)
                told.ack_id = ack_id
                self._answers.nack.append(told)
        del self._held[held.delivery.message_id]
        if self._tails.get(key) is task:
            del self._tails[key]
        if not self._held:
            self._empty.set()
        self._answers.news.set()

    def _give_back(self, ack_id: str) -> None:
        self._answers.extend[ack_id] = 0.0
        self._answers.news.set()

    async def _handle(self, delivery: pb.Delivery) -> pb.Refusal | None:
        trace = delivery.attributes.get("traceparent", "")
        if TRACEPARENT.fullmatch(trace):
            call_context.set(CallContext(traceparent=trace))  # of this task alone
        try:
            await self._handler(delivery)
        except RejectError as error:
            self._on_error(error)
            return pb.Refusal(reason=str(error), dead=True)
        except RetryLaterError as error:
            self._on_error(error)
            refusal = pb.Refusal(reason=str(error))
            refusal.delay.FromMilliseconds(round(error.delay_s * 1000))
            return refusal
        except Exception as error:  # noqa: BLE001 - any failure of the handler is the message's
            self._on_error(error)
            return pb.Refusal(reason=f"{type(error).__name__}: {error}")
        return None

    def _log(self, error: Exception) -> None:
        log.warning("subscription %s: %s: %s", self._subscription, type(error).__name__, error)
