"""QueueingService over a real server, StreamingPull above all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.servicer import QueueingServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Serve


@pytest.fixture
async def stub(tmp_path: Path, serve: Serve) -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
    async with (
        SqliteBroker(tmp_path / "queue.sqlite") as broker,
        serve(
            lambda server: queueing_pb2_grpc.add_QueueingServiceServicer_to_server(
                QueueingServicer(broker), server
            )
        ) as channel,
    ):
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        await stub.CreateTopic(pb.CreateTopicRequest(topic="jobs"))
        subscription = pb.Subscription(name="work", topic="jobs")
        await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
        yield stub


async def _publish(stub: queueing_pb2_grpc.QueueingServiceStub, *bodies: str) -> None:
    messages = [pb.Message(data=body.encode()) for body in bodies]
    await stub.Publish(pb.PublishRequest(topic="jobs", messages=messages))


async def test_a_stream_delivers_within_its_flow_control_and_goes_on_after_acks(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await _publish(stub, *map(str, range(10)))
    said: asyncio.Queue[pb.StreamingPullRequest] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(subscription="work", max_outstanding_messages=3)
        while True:
            yield await said.get()

    seen: list[str] = []
    async with asyncio.timeout(20):
        call = stub.StreamingPull(requests())
        async for response in call:
            assert len(response.deliveries) <= 3
            seen += [delivery.data.decode() for delivery in response.deliveries]
            stats = await stub.GetStats(pb.GetStatsRequest(subscription="work"))
            assert stats.leased <= 3
            said.put_nowait(
                pb.StreamingPullRequest(acknowledge=[delivery.ack_id for delivery in response.deliveries])
            )
            if len(seen) == 10:
                break
        call.cancel()
    assert seen == [str(number) for number in range(10)]


async def test_a_consumer_that_goes_away_frees_its_messages_at_once(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await _publish(stub, "a")

    async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(subscription="work")
        await asyncio.Event().wait()

    call = stub.StreamingPull(requests())
    async for response in call:
        assert [delivery.data for delivery in response.deliveries] == [b"a"]
        break
    call.cancel()
    wait = pb.PullRequest(subscription="work")
    wait.wait.FromSeconds(10)
    (delivery,) = (await stub.Pull(wait)).deliveries
    assert delivery.attempt == 1


async def test_nacks_on_the_stream_reach_the_dead_letters(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await _publish(stub, "bad")
    said: asyncio.Queue[pb.StreamingPullRequest] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(subscription="work")
        while True:
            yield await said.get()

    call = stub.StreamingPull(requests())
    async for response in call:
        if response.expired:
            break
        (delivery,) = response.deliveries
        refusal = pb.Refusal(ack_id=delivery.ack_id, reason="corrupt", dead=True)
        said.put_nowait(pb.StreamingPullRequest(nack=[refusal], acknowledge=["invented"]))
    call.cancel()
    letters = await stub.ListDeadLetters(pb.ListDeadLettersRequest(subscription="work"))
    assert [letter.reason for letter in letters.dead_letters] == ["corrupt"]


async def test_an_unknown_subscription_ends_the_stream_with_not_found(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    async def consume() -> None:
        async for _ in stub.StreamingPull(iter([pb.StreamingPullRequest(subscription="nothing")])):
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await consume()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_page_token_belongs_to_its_listing(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    await stub.CreateTopic(pb.CreateTopicRequest(topic="more"))
    page = await stub.ListTopics(pb.ListTopicsRequest(page_size=1))
    assert [topic.name for topic in page.topics] == ["jobs"]
    rest = await stub.ListTopics(pb.ListTopicsRequest(page_token=page.next_page_token))
    assert [topic.name for topic in rest.topics] == ["more"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListSubscriptions(pb.ListSubscriptionsRequest(page_token=page.next_page_token))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
