"""Queues deleted behind the service's back, which is killed before, while and after it makes them again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.rabbit.topology import levels, queue_name
from services.queueing.resources import Subscription
from tests.servers.queueing import QueueingServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.servers.rabbitmq import RabbitServer

Stub = queueing_pb2_grpc.QueueingServiceStub
pytestmark = pytest.mark.timeout(400)
PATIENCE_S = 240.0
MESSAGES = 12
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def tried(call: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    """What a call gives once the service is there for it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                await asyncio.sleep(0.1)


async def published(stub: Stub, name: str, number: int) -> str:
    """Its id, once it is confirmed; some come later, and each has a deduplication id."""
    message = pb.Message(data=name.encode(), dedup_id=name, ordering_key="k")
    if number % 3 == 2:
        message.delay.FromMilliseconds(200)
    answer = await tried(stub.Publish, pb.PublishRequest(topic="jobs", messages=[message]))
    (message_id,) = answer.message_ids
    return str(message_id)


async def acknowledged(stub: Stub, count: int) -> list[str]:
    """The ids of so many messages."""
    done: list[str] = []
    pull = pb.PullRequest(subscription="work", max_messages=100)
    pull.wait.FromMilliseconds(500)
    async with asyncio.timeout(PATIENCE_S):
        while len(done) < count:
            deliveries = (await tried(stub.Pull, pull)).deliveries
            if not deliveries:
                continue
            ids = [delivery.ack_id for delivery in deliveries]
            said = pb.AcknowledgeRequest(subscription="work", ack_ids=ids)
            expired = set((await tried(stub.Acknowledge, said)).expired)
            done += [delivery.message_id for delivery in deliveries if delivery.ack_id not in expired]
    return done


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_is_confirmed_after_queues_were_deleted_outlives_the_service(
    rabbitmq: RabbitServer, rabbitmq_vhost: str, tmp_path: Path, *, ordered: bool
) -> None:
    def delete() -> None:
        with rabbitmq.http() as http:
            for level in levels(Subscription("work", "jobs", ordered=ordered)):
                http.delete(f"/queues/{rabbitmq_vhost}/{queue_name('work', level)}").raise_for_status()

    with QueueingServer(tmp_path, rabbitmq.url(rabbitmq_vhost)) as service:
        async with service.channel() as channel:
            stub = Stub(channel)
            await tried(stub.CreateTopic, pb.CreateTopicRequest(topic="jobs"))
            subscription = pb.Subscription(name="work", topic="jobs", ordered=ordered)
            await tried(stub.CreateSubscription, pb.CreateSubscriptionRequest(subscription=subscription))
            await published(stub, "before", 0)
            await acknowledged(stub, 1)  # from now on it consumes them
            for confirmed in (0, 1, MESSAGES):  # of what was published after the deletion, before the kill
                await asyncio.to_thread(delete)
                names = [f"{confirmed}-{number}" for number in range(MESSAGES)]
                sending = [
                    asyncio.create_task(published(stub, name, number)) for number, name in enumerate(names)
                ]
                told = asyncio.as_completed(sending)
                for _ in range(confirmed):
                    await next(told)
                await asyncio.to_thread(service.kill)
                await asyncio.to_thread(service.start)
                ids = await asyncio.gather(*sending)
                assert sorted(await acknowledged(stub, MESSAGES)) == sorted(ids)
            stats = await tried(stub.GetStats, pb.GetStatsRequest(subscription="work"))
            assert (stats.ready, stats.leased, stats.delayed, stats.dead) == (0, 0, 0, 0)
