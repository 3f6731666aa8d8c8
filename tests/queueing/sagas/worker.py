"""A worker that does the steps of sagas over gRPC, with a ledger of what it did; it outlives its service."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import duration_pb2

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.replies import Kind, Reply, request_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

TOPICS = ("work.reserve", "work.inform", "work.charge", "work.undo")
SUBSCRIPTION = "worker"


class Refusal(Exception):  # noqa: N818 - what a worker says, not what goes wrong in a test
    """Raised by a handler: the gRPC code's name of its error reply."""


class Silence(Exception):  # noqa: N818 - the same
    """Raised by a handler that never answers."""


@dataclass
class Worker:
    """Does each call once, however often its request comes; answers each time."""

    handler: Callable[[dict[str, Any]], object]
    effects: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    _answers: dict[str, Reply] = field(default_factory=dict)

    async def consume(self, channel: grpc.aio.Channel) -> None:
        """Work for a service until cancelled or until it dies."""
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        wait = duration_pb2.Duration(seconds=20)
        request = pb.PullRequest(subscription=SUBSCRIPTION, max_messages=10, wait=wait)
        with suppress(grpc.aio.AioRpcError):
            while True:
                for delivery in (await stub.Pull(request)).deliveries:
                    await self._do(stub, delivery)

    def effects_of(self, saga_id: str) -> list[str]:
        """What was done for one saga, in order."""
        return [
            f"{content['step']} {content['phase']}"
            for content in self.requests
            if content["saga_id"] == saga_id
        ]

    async def _do(self, stub: queueing_pb2_grpc.QueueingServiceStub, delivery: pb.Delivery) -> None:
        request = request_of(delivery.attributes)
        assert request is not None
        answer = self._answers.get(request.call_id)
        if answer is None:
            content = json.loads(delivery.data)
            self.requests.append(content)
            self.effects.append(f"{content['step']} {content['phase']}")
            try:
                data = json.dumps(self.handler(content)).encode()
                answer = Reply(request.call_id, Kind.RESULT, data)
            except Refusal as refusal:
                answer = Reply(request.call_id, Kind.ERROR, b"no", code=str(refusal))
            except Silence:
                answer = Reply(request.call_id, Kind.PROGRESS)
            self._answers[request.call_id] = answer
        reply = answer.message()
        message = pb.Message(data=reply.data, attributes=reply.attributes)
        await stub.Publish(pb.PublishRequest(topic=request.reply_to, messages=[message]))
        await stub.Acknowledge(pb.AcknowledgeRequest(subscription=SUBSCRIPTION, ack_ids=[delivery.ack_id]))

    @asynccontextmanager
    async def at(self, channel: grpc.aio.Channel) -> AsyncIterator[None]:
        """Work for a service during the block."""
        task = asyncio.create_task(self.consume(channel))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def prepare(channel: grpc.aio.Channel) -> None:
    """Make the topics of the steps and the worker's subscription, which sees all of them in order."""
    stub = queueing_pb2_grpc.QueueingServiceStub(channel)
    for topic in TOPICS:
        await stub.CreateTopic(pb.CreateTopicRequest(topic=topic))
    subscription = pb.Subscription(
        name=SUBSCRIPTION,
        topic="work.*",
        ordered=True,
        ack_deadline=duration_pb2.Duration(seconds=1),
        retry=pb.RetryPolicy(max_attempts=1000, backoff=pb.BACKOFF_IMMEDIATE),
    )
    await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
