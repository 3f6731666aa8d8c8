"""The SDK's publisher against a real service: batches, bounds, failures, repetition."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

import plexus.client
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
    from tests.servers.queueing import QueueingServer

pytestmark = pytest.mark.timeout(400)
LONG_S = 120.0


async def ready(stub: QueueingServiceStub) -> int:
    """How many messages `work` has; of a service that may be coming up, or wait for its broker."""
    try:
        stats = await stub.GetStats(pb.GetStatsRequest(subscription="work"), wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return 0
    return stats.ready


async def drain(stub: QueueingServiceStub, subscription: str = "work") -> list[pb.Delivery]:
    """Everything a subscription holds, acknowledged."""
    found: list[pb.Delivery] = []
    while True:
        stats = await stub.GetStats(pb.GetStatsRequest(subscription=subscription))
        if not stats.ready + stats.leased + stats.delayed:
            return found
        request = pb.PullRequest(subscription=subscription, max_messages=1000)
        request.wait.FromSeconds(1)
        pulled = (await stub.Pull(request)).deliveries
        if pulled:
            ack_ids = [delivery.ack_id for delivery in pulled]
            await stub.Acknowledge(pb.AcknowledgeRequest(subscription=subscription, ack_ids=ack_ids))
            found += pulled


async def test_what_is_sent_is_published_in_order_and_settled_at_the_end(
    queueing: QueueingServiceStub,
) -> None:
    async with asyncio.timeout(LONG_S), plexus.client.Publisher(queueing, "jobs") as publisher:
        futures = [await publisher.send(b"%d" % number) for number in range(2500)]
    ids = [future.result() for future in futures]
    deliveries = await drain(queueing)
    assert [delivery.message_id for delivery in deliveries] == ids
    assert [delivery.data for delivery in deliveries] == [b"%d" % number for number in range(2500)]


async def test_the_same_deduplication_id_is_published_once(queueing: QueueingServiceStub) -> None:
    message = pb.Message(data=b"a", dedup_id="order-17", attributes={"k": "v"})
    async with plexus.client.Publisher(queueing, "jobs") as publisher:
        first = await publisher.publish(message)
        assert await publisher.publish(message) == first
        assert await publisher.publish(b"a") != first
    assert [dict(delivery.attributes).get("k") for delivery in await drain(queueing)] == ["v", None]


async def test_a_refused_message_fails_alone(queueing: QueueingServiceStub) -> None:
    async with asyncio.timeout(LONG_S), plexus.client.Publisher(queueing, "jobs") as publisher:
        futures = [await publisher.send(b"%d" % number) for number in range(5)]
        futures.insert(3, await publisher.send(pb.Message(data=b"bad", attributes={"": "hostile"})))
        results = await asyncio.gather(*futures, return_exceptions=True)
        (failure,) = (each for each in results if isinstance(each, BaseException))
        assert isinstance(failure, plexus.client.PublishError)
        assert failure.problem is not None
        assert (failure.problem.code, failure.unknown) == (grpc.StatusCode.INVALID_ARGUMENT, False)
        assert results.index(failure) == 3
        with pytest.raises(ValueError, match="at most"):
            await publisher.send(b"x" * (13 * 1024 * 1024))
    assert sorted(delivery.data for delivery in await drain(queueing)) == [b"%d" % n for n in range(5)]


async def test_an_unknown_topic_fails_and_the_publisher_goes_on(queueing: QueueingServiceStub) -> None:
    async with asyncio.timeout(LONG_S), plexus.client.Publisher(queueing, "later") as publisher:
        with pytest.raises(plexus.client.PublishError) as caught:
            await publisher.publish(b"a")
        assert caught.value.problem is not None
        assert caught.value.problem.reason == "TOPIC_NOT_FOUND"
        await queueing.CreateTopic(pb.CreateTopicRequest(topic="later"))
        assert await publisher.publish(b"b")


async def test_send_waits_for_room_and_no_longer(queueing: QueueingServiceStub) -> None:
    publisher = plexus.client.Publisher(queueing, "jobs", max_messages=3, max_bytes=1000)
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(20):
            await publisher.send(b"x" * 200)
            sent += 1

    # Not begun yet, so nothing is settled: only what has room is taken.
    sender = asyncio.create_task(send())
    for _ in range(100):
        await asyncio.sleep(0)
    assert sent == 3
    async with asyncio.timeout(LONG_S), publisher:
        await sender
    assert len(await drain(queueing)) == 20


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
async def test_without_a_service_a_message_fails_at_its_deadline_as_unknown(
    server: QueueingServer, killable: QueueingServiceStub
) -> None:
    async with asyncio.timeout(LONG_S):
        async with plexus.client.Publisher(killable, "jobs", deadline_s=1) as publisher:
            await publisher.publish(b"a")
            server.kill()
            with pytest.raises(plexus.client.PublishError) as caught:
                await publisher.publish(b"b")
            assert caught.value.unknown
        # Everything is settled: leaving did not hang.


async def test_a_killed_service_costs_nothing_and_stores_nothing_twice(
    server: QueueingServer, killable: QueueingServiceStub
) -> None:
    ids: dict[bytes, str] = {}
    total = 700

    async def publish() -> None:
        async with plexus.client.Publisher(
            killable, "jobs", deadline_s=LONG_S, max_messages=300
        ) as publisher:
            futures = []
            for number in range(total):
                body = b"%d" % number
                message = pb.Message(data=body, ordering_key=f"k{number % 7}")
                futures.append((body, await publisher.send(message)))
            for body, future in futures:
                ids[body] = await future

    async with asyncio.timeout(2 * LONG_S):
        publishing = asyncio.create_task(publish())
        for share in (4, 2):
            while await ready(killable) < total // share:  # noqa: ASYNC110 - polls a server
                await asyncio.sleep(0.01)
            server.kill()
            server.start()
        await publishing
        deliveries = await drain(killable, "ordered")
    assert {delivery.data: delivery.message_id for delivery in deliveries} == ids
    assert len({delivery.message_id for delivery in deliveries}) == total
    for key in range(7):
        numbers = [int(each.data) for each in deliveries if each.ordering_key == f"k{key}"]
        assert sorted(set(numbers), key=numbers.index) == sorted(set(numbers))
