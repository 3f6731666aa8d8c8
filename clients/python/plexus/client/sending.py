"""What sends tasks: a publisher for each queue, and the channel of the results."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self, TypeVar

from plexus.client.kept import KEEP, declare_log, expected, find, log_of, new_id
from plexus.client.publisher import Publisher
from plexus.client.results import Handle, ReplyChannel, present
from plexus.client.retrying import persist
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from plexus.client.tasks import Task
    from plexus.queueing.v1 import queueing_pb2_grpc

R = TypeVar("R")

MAX_RETRIES = 999
_PATIENCE_S = 60.0


class Sender:
    """Sends tasks of any app through one service; use it with `async with`.

    At its end everything sent is durable or has failed, and results come no more.
    """

    def __init__(self, stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
        self._stub = stub
        self._stack = AsyncExitStack()
        self._publishers: dict[str, Publisher] = {}
        self._opening = asyncio.Lock()
        self._replies = ReplyChannel(stub)

    async def __aenter__(self) -> Self:
        """Return itself; what it needs is made when it is first needed."""
        await self._stack.enter_async_context(self._replies)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle what was sent."""
        await self._stack.__aexit__(kind, error, trace)

    async def send(self, task: Task[Any, Any, Any], data: bytes) -> str:
        """Send a task that wants no result.

        Args:
            task: Which.
            data: Its arguments.

        Returns:
            The message's id, once it is durable.

        Raises:
            PublishError: It could not be sent.
            grpc.RpcError: Its queue could not be made.
        """
        return await self._publish(task, data, {})

    async def delay(self, task: Task[Any, R, Any], data: bytes) -> Handle[R]:
        """Send a task whose result comes to the handle; see `send`."""
        handle = Handle(new_id(), task.returns)
        attributes = await self._replies.expect(handle)
        if task.keep_s:
            attributes[KEEP] = log_of(task.queue)
            log = await self._publisher(
                attributes[KEEP], lambda: declare_log(self._stub, task.queue, task.app.keep_s(task.queue))
            )
            await log.publish(expected(handle.call_id))
        await self._publish(task, data, attributes)
        return handle

    async def find(self, task: Task[Any, R, Any], call_id: str, *, timeout_s: float) -> R:
        """Wait for a result that any process asked for; see `plexus.client.kept.find`."""
        return await find(self._stub, task.queue, call_id, task.returns, timeout_s=timeout_s)

    async def _publish(self, task: Task[Any, Any, Any], data: bytes, attributes: dict[str, str]) -> str:
        publisher = await self._publisher(task.queue, lambda: declare(self._stub, task.queue))
        return await publisher.publish(task.message(data, attributes))

    async def _publisher(self, topic: str, make: Callable[[], Awaitable[None]]) -> Publisher:
        """The publisher of a topic, which is made before."""
        if topic in self._publishers:
            return self._publishers[topic]
        async with self._opening:
            if topic not in self._publishers:
                await persist(make, within_s=_PATIENCE_S)
                publisher = await self._stack.enter_async_context(Publisher(self._stub, topic))
                self._publishers[topic] = publisher
            return self._publishers[topic]


async def declare(stub: queueing_pb2_grpc.QueueingServiceStub, queue: str) -> None:
    """Make a queue, a topic and a subscription of one name, unless it is there; present settings stay."""
    subscription = pb.Subscription(name=queue, topic=queue)
    # How often a task is tried is said by its message, or decided by its worker.
    subscription.retry.max_attempts = MAX_RETRIES + 1
    with present():
        await stub.CreateTopic(pb.CreateTopicRequest(topic=queue))
    with present():
        await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
