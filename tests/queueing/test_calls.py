"""Call over a real server, on each broker: progress, results, errors, deadlines, callers that go away."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest

from plexus.client.failures import problem
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import ALIVE, PREFIX, Calls
from services.queueing.domain import Message
from services.queueing.kept import Where
from services.queueing.replies import Kind, Reply, request_of
from services.queueing.resources import Subscription, Topic
from services.queueing.servicer import QueueingServicer
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from services.queueing.domain import Broker
    from tests.conftest import Serve

pytestmark = pytest.mark.timeout(400)  # the first test on RabbitMQ starts it
LONG_S = 120.0


@pytest.fixture(params=["sqlite", "rabbitmq"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    opened: AbstractAsyncContextManager[Broker]
    if request.param == "sqlite":
        opened = SqliteBroker(tmp_path / "queue.sqlite")
    else:
        vhost = request.getfixturevalue("rabbitmq_vhost")
        url = request.getfixturevalue("rabbitmq").url(vhost)
        opened = rabbit_broker(url, tmp_path / "state.sqlite")
    async with opened as broker:
        await broker.create_topic(Topic("jobs"))
        await broker.create_subscription(Subscription("work", "jobs"))
        yield broker


@pytest.fixture
async def stub(broker: Broker, serve: Serve) -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
    async with (
        Calls(broker) as calls,
        serve(
            lambda server: queueing_pb2_grpc.add_QueueingServiceServicer_to_server(
                QueueingServicer(broker, calls), server
            )
        ) as channel,
    ):
        yield queueing_pb2_grpc.QueueingServiceStub(channel)


async def _take(broker: Broker) -> tuple[Message, str, str]:
    """The next request of `jobs`, done with: its message, where replies go, and its call."""
    async with asyncio.timeout(LONG_S):
        while not (deliveries := await broker.pull("work", max_messages=1, max_bytes=10**7, wait_s=10)):
            pass
    (delivery,) = deliveries
    await broker.acknowledge("work", [delivery.ack_id])
    request = request_of(delivery.message.attributes)
    assert request is not None
    assert time.time() < request.deadline <= time.time() + LONG_S
    message = Message(delivery.data, delivery.message.attributes)
    return message, request.reply_to, request.call_id


@asynccontextmanager
async def worker(broker: Broker, replies: Sequence[Reply], *, count: int = 1) -> AsyncIterator[None]:
    """Answers requests with these replies, whose `data` may show the request's."""

    async def answer() -> None:
        for _ in range(count):
            message, reply_to, call_id = await _take(broker)
            for reply in replies:
                data = reply.data.replace(b"{}", message.data)
                told = Reply(call_id, reply.kind, data, reply.code, reply.reason).message()
                await broker.publish(reply_to, [told])

    task = asyncio.create_task(answer())
    yield
    await task


def request_to(topic: str = "jobs", data: bytes = b"", *, timeout_s: int = int(LONG_S)) -> pb.CallRequest:
    request = pb.CallRequest(topic=topic, data=data)
    request.timeout.FromSeconds(timeout_s)
    return request


async def _failure(call: AsyncIterable[pb.CallResponse]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _told(call)
    return caught.value


async def _told(call: AsyncIterable[pb.CallResponse]) -> list[tuple[str, bytes]]:
    told = []
    async for response in call:
        kind = "result" if response.HasField("result") else "progress"
        told.append((kind, getattr(response, kind).data))
    return told


async def test_progress_comes_as_it_is_made_and_the_first_result_ends_the_call(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    said = [
        Reply("", Kind.PROGRESS, b"1 of 2"),
        Reply("", Kind.PROGRESS, b"2 of 2"),
        Reply("", Kind.RESULT, b"did {}"),
        Reply("", Kind.RESULT, b"did it again"),
        Reply("", Kind.ERROR, b"no", "ABORTED"),
    ]
    async with worker(broker, said, count=2):
        for name in (b"a", b"b"):
            told = await _told(stub.Call(request_to(data=name)))
            assert told == [("progress", b"1 of 2"), ("progress", b"2 of 2"), ("result", b"did " + name)]


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)  # which gives in one what was published in one
async def test_of_two_results_that_come_at_once_the_first_counts(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    async def answer() -> None:
        _, reply_to, call_id = await _take(broker)
        said = [
            Reply(call_id, Kind.RESULT, b"first"),
            Reply(call_id, Kind.RESULT, b"second"),
            Reply(call_id, Kind.ERROR, b"no", "ABORTED"),
        ]
        await broker.publish(reply_to, [reply.message() for reply in said])

    answering = asyncio.create_task(answer())
    assert await _told(stub.Call(request_to())) == [("result", b"first")]
    await answering


async def test_calls_at_once_get_their_own_results(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    async def ask(name: bytes) -> bytes:
        answer = await stub.CallAndWait(pb.CallAndWaitRequest(request=request_to(data=name)))
        return answer.result.data

    names = [b"%d" % number for number in range(20)]
    async with worker(broker, [Reply("", Kind.RESULT, b"did {}")], count=20):
        assert await asyncio.gather(*map(ask, names)) == [b"did " + name for name in names]


async def test_a_workers_error_arrives_as_its_code_with_details(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    error = Reply("", Kind.ERROR, b"no such invoice", "NOT_FOUND", "INVOICE_NOT_FOUND")
    async with worker(broker, [error, error], count=2):
        failure = await _failure(stub.Call(request_to()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CallAndWait(pb.CallAndWaitRequest(request=request_to()))
    for found in (problem(failure), problem(caught.value)):
        assert (found.code, found.message) == (grpc.StatusCode.NOT_FOUND, "no such invoice")
        assert (found.reason, found.metadata["topic"]) == ("INVOICE_NOT_FOUND", "jobs")


async def test_without_a_subscriber_a_call_fails_at_once(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    await broker.create_topic(Topic("deaf"))
    await broker.create_subscription(Subscription("picky", "deaf", filter="attributes:wanted"))
    found = problem(await _failure(stub.Call(request_to("deaf"))))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_SUBSCRIBERS")
    failure = await _failure(stub.Call(request_to("nothing")))
    assert failure.code() is grpc.StatusCode.NOT_FOUND


async def test_a_call_that_nobody_answers_ends_at_its_deadline_and_its_request_is_given_up(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    found = problem(await _failure(stub.Call(request_to(timeout_s=1))))
    assert (found.code, found.metadata["topic"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "jobs")
    async with asyncio.timeout(LONG_S):
        while not (letters := await broker.list_dead_letters("work", Where(), limit=10)):  # noqa: ASYNC110 - polls a broker
            await asyncio.sleep(0.05)
    assert [letter.reason for letter in letters] == ["expired"]


async def test_what_is_told_to_a_caller_that_went_away_is_dropped(
    broker: Broker, stub: queueing_pb2_grpc.QueueingServiceStub
) -> None:
    gone = stub.Call(request_to())
    await gone.wait_for_connection()  # the request is published then
    gone.cancel()
    _, reply_to, call_id = await _take(broker)
    await broker.publish(reply_to, [Reply(call_id, Kind.RESULT, b"late").message()])
    async with worker(broker, [Reply("", Kind.RESULT, b"{}")]):
        assert await _told(stub.Call(request_to(data=b"next"))) == [("result", b"next")]
    assert (await broker.stats(reply_to)).dead == 0


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
async def test_bad_requests_are_typed_errors(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    for request in (
        request_to(timeout_s=0),
        request_to(timeout_s=3601),
        request_to(timeout_s=-1),
        pb.CallRequest(topic="jobs", attributes={f"k{n}": "" for n in range(64)}),
        pb.CallRequest(topic="jobs", data=b"x" * (10 * 1024 * 1024 + 1)),
    ):
        failure = await _failure(stub.Call(request))
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT, failure


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
async def test_the_channel_of_a_dead_replica_is_deleted_and_ones_own_at_the_end(broker: Broker) -> None:
    now = int(time.time())
    for name, alive in (("dead", now - 3600), ("living", now)):
        await broker.create_topic(Topic(f"{PREFIX}{name}", labels={ALIVE: str(alive)}))
        await broker.create_subscription(Subscription(f"{PREFIX}{name}", f"{PREFIX}{name}"))

    async def channels() -> set[str]:
        return {topic.name for topic in await broker.list_topics(limit=100, after=PREFIX)}

    async def nothing() -> None:
        pass

    async with Calls(broker) as calls:
        replies = calls.call("jobs", Message(b""), LONG_S, published=nothing)
        asked = asyncio.ensure_future(anext(replies))
        _, own, call_id = await _take(broker)
        await broker.publish(own, [Reply(call_id, Kind.RESULT, b"").message()])
        await asked
        await replies.aclose()
        async with asyncio.timeout(LONG_S):
            while await channels() != {own, f"{PREFIX}living"}:  # noqa: ASYNC110 - polls a broker
                await asyncio.sleep(0.02)
    assert await channels() == {f"{PREFIX}living"}
    assert [s.name for s in await broker.list_subscriptions(limit=10)] == [f"{PREFIX}living", "work"]
