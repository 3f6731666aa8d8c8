"""What sends tasks: a publisher for each queue, and the channel of the results."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self, TypeVar

from plexus.client.publisher import Publisher
from plexus.client.results import Handle, ReplyChannel, present
from plexus.client.retrying import persist
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
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
        self._queues: set[str] = set()
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
        handle = Handle(uuid.uuid4().hex, task.returns)
        await self._publish(task, data, await self._replies.expect(handle))
        return handle

    async def _publish(self, task: Task[Any, Any, Any], data: bytes, attributes: dict[str, str]) -> str:
        publisher = await self.publisher(task.queue, queue=True)
        return await publisher.publish(task.message(data, attributes))

    async def publisher(self, topic: str, *, queue: bool = False) -> Publisher:
        """The publisher of a topic.

        Args:
            topic: Its name.
            queue: Make the topic, and a subscription of its name, unless they are there.

        Raises:
            grpc.RpcError: It could not be made.
        """
        async with self._opening:
            if queue and topic not in self._queues:
                await persist(lambda: declare(self._stub, topic), within_s=_PATIENCE_S)
                self._queues.add(topic)
            if topic not in self._publishers:
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
