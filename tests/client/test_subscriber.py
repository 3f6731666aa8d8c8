"""The SDK's subscriber against a real service: leases, answers, order, drain, loss of the service."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import pytest

import plexus.client
from plexus.client.propagation import call_context
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
    from tests.servers.queueing import QueueingServer

pytestmark = pytest.mark.timeout(400)
LONG_S = 120.0


async def publish(stub: QueueingServiceStub, *bodies: bytes, key: str = "") -> None:
    messages = [pb.Message(data=body, ordering_key=key) for body in bodies]
    await stub.Publish(pb.PublishRequest(topic="jobs", messages=messages))


async def stats(stub: QueueingServiceStub, subscription: str = "work") -> pb.Stats:
    return await stub.GetStats(pb.GetStatsRequest(subscription=subscription))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110 - what is polled has no event
            await asyncio.sleep(0.01)


async def test_what_a_handler_calls_belongs_to_the_trace_of_its_message(
    queueing: QueueingServiceStub,
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    seen: dict[bytes, str] = {}

    async def handle(delivery: pb.Delivery) -> None:
        context = call_context.get()
        seen[delivery.data] = context.traceparent if context else ""

    carried = [pb.Message(data=text.encode(), attributes={"traceparent": text}) for text in (trace, "Größe")]
    await queueing.Publish(pb.PublishRequest(topic="jobs", messages=[*carried, pb.Message(data=b"none")]))
    async with plexus.client.Subscriber(queueing, "work", handle, concurrency=1):
        await until(lambda: len(seen) == 3)
    assert seen == {trace.encode(): trace, "Größe".encode(): "", b"none": ""}


async def test_handlers_run_at_once_up_to_the_bound_and_their_messages_are_acknowledged(
    queueing: QueueingServiceStub,
) -> None:
    running, most, seen = 0, 0, Counter[bytes]()
    full = asyncio.Event()

    async def handle(delivery: pb.Delivery) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 4:
            full.set()
        await full.wait()
        running -= 1
        seen[delivery.data] += 1

    await publish(queueing, *(b"%d" % number for number in range(40)))
    async with plexus.client.Subscriber(queueing, "work", handle, concurrency=4):
        await until(lambda: len(seen) == 40)
    assert (most, set(seen.values())) == (4, {1})
    left = await stats(queueing)
    assert (left.ready, left.leased, left.delayed, left.dead) == (0, 0, 0, 0)


async def test_what_a_handler_raises_decides_what_becomes_of_its_message(
    queueing: QueueingServiceStub,
) -> None:
    attempts = Counter[bytes]()
    told: list[str] = []

    async def handle(delivery: pb.Delivery) -> None:
        attempts[delivery.data] += 1
        if delivery.data == b"hopeless":
            raise plexus.client.RejectError("cannot be read")
        if delivery.data == b"later" and delivery.attempt == 1:
            raise plexus.client.RetryLaterError("not yet", delay_s=0.01)
        if delivery.data == b"poison":
            raise ValueError("bad number")

    await publish(queueing, b"hopeless", b"later", b"poison")
    subscriber = plexus.client.Subscriber(
        queueing, "work", handle, on_error=lambda error: told.append(type(error).__name__)
    )
    async with subscriber:
        await until(lambda: attempts == {b"hopeless": 1, b"later": 2, b"poison": 3})
    letters = await queueing.ListDeadLetters(pb.ListDeadLettersRequest(subscription="work"))
    assert {letter.data: letter.reason for letter in letters.dead_letters} == {
        b"hopeless": "cannot be read",
        b"poison": "ValueError: bad number",
    }
    assert Counter(told) == {"RejectError": 1, "RetryLaterError": 1, "ValueError": 3}


async def test_a_lease_is_renewed_for_as_long_as_the_handler_runs(queueing: QueueingServiceStub) -> None:
    short = pb.Subscription(name="short", topic="jobs")
    short.ack_deadline.FromSeconds(1)
    await queueing.CreateSubscription(pb.CreateSubscriptionRequest(subscription=short))
    attempts: list[int] = []
    other: list[pb.Delivery] = []

    async def handle(delivery: pb.Delivery) -> None:
        attempts.append(delivery.attempt)
        request = pb.PullRequest(subscription="short")
        request.wait.FromSeconds(3)  # three times the lease
        other.extend((await queueing.Pull(request)).deliveries)

    await publish(queueing, b"long")
    async with plexus.client.Subscriber(queueing, "short", handle):
        await until(lambda: bool(attempts))
    assert (attempts, other) == ([1], [])
    left = await stats(queueing, "short")
    assert (left.ready, left.leased, left.delayed) == (0, 0, 0)


async def test_messages_of_a_key_are_handled_one_after_the_other(queueing: QueueingServiceStub) -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    running = Counter[str]()
    refused = set[bytes]()

    async def handle(delivery: pb.Delivery) -> None:
        key = delivery.ordering_key
        running[key] += 1
        assert running[key] == 1
        await asyncio.sleep(0)
        running[key] -= 1
        if int(delivery.data) % 5 == 0 and delivery.data not in refused:
            refused.add(delivery.data)
            raise ValueError("once")
        seen[key].append(int(delivery.data))

    for number in range(20):
        await publish(queueing, b"%d" % number, key="ab"[number % 2])
    async with plexus.client.Subscriber(queueing, "ordered", handle, on_error=lambda _: None):
        await until(lambda: sum(map(len, seen.values())) == 20)
    assert seen == {"a": list(range(0, 20, 2)), "b": list(range(1, 20, 2))}


async def test_drain_lets_handlers_finish_takes_nothing_new_and_returns_the_rest(
    queueing: QueueingServiceStub,
) -> None:
    begun, finish, done = set[bytes](), asyncio.Event(), set[bytes]()

    async def handle(delivery: pb.Delivery) -> None:
        begun.add(delivery.data)
        if delivery.data == b"stuck":
            await asyncio.Event().wait()
        await finish.wait()
        done.add(delivery.data)

    await publish(queueing, b"stuck", b"a", b"b")
    subscriber = plexus.client.Subscriber(queueing, "work", handle, concurrency=4, drain_s=3)
    running = asyncio.create_task(subscriber.run())
    await until(lambda: len(begun) == 3)
    subscriber.drain()
    await publish(queueing, b"new")
    finish.set()
    async with asyncio.timeout(LONG_S):
        await running
    assert (begun, done) == ({b"stuck", b"a", b"b"}, {b"a", b"b"})
    pulled = await queueing.Pull(pb.PullRequest(subscription="work", max_messages=10))
    assert {(each.data, each.attempt) for each in pulled.deliveries} == {(b"stuck", 1), (b"new", 1)}


async def test_cancelling_gives_everything_back_at_once(queueing: QueueingServiceStub) -> None:
    begun, ended = set[bytes](), set[bytes]()

    async def handle(delivery: pb.Delivery) -> None:
        begun.add(delivery.data)
        try:
            await asyncio.Event().wait()
        finally:
            ended.add(delivery.data)

    await publish(queueing, b"a", b"b")
    running = asyncio.create_task(plexus.client.Subscriber(queueing, "work", handle).run())
    await until(lambda: len(begun) == 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert ended == begun
    request = pb.PullRequest(subscription="work", max_messages=1)
    request.wait.FromSeconds(60)
    again = [(await queueing.Pull(request)).deliveries[0] for _ in range(2)]
    assert {(each.data, each.attempt) for each in again} == {(b"a", 1), (b"b", 1)}


async def test_a_subscription_that_is_not_there_is_told(queueing: QueueingServiceStub) -> None:
    async def handle(delivery: pb.Delivery) -> None:
        raise AssertionError(delivery)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plexus.client.Subscriber(queueing, "nothing", handle).run()
    assert plexus.client.problem(caught.value).reason == "SUBSCRIPTION_NOT_FOUND"


async def test_a_killed_service_interrupts_no_handler_and_loses_no_message(
    server: QueueingServer, killable: QueueingServiceStub
) -> None:
    seen = Counter[bytes]()
    begun, interrupted = 0, 0
    go_on = asyncio.Event()

    async def handle(delivery: pb.Delivery) -> None:
        nonlocal begun, interrupted
        begun += 1
        try:
            await go_on.wait()
        except asyncio.CancelledError:
            interrupted += 1
            raise
        seen[delivery.data] += 1

    bodies = [b"%d" % number for number in range(60)]
    await publish(killable, *bodies)
    subscriber = plexus.client.Subscriber(killable, "work", handle, concurrency=8, on_error=lambda _: None)
    async with subscriber:
        await until(lambda: begun == 8)
        server.kill()
        server.start()
        go_on.set()
        await until(lambda: len(seen) >= 30)
        server.kill()
        server.start()
        await until(lambda: len(seen) == 60)
    assert interrupted == 0
    # For each kill come again at most those that were being handled, and as many whose acknowledgement was
    # being made durable; the others once.
    assert sum(seen.values()) <= 60 + 2 * (8 + 8)


async def test_a_message_that_comes_again_while_it_is_handled_is_not_handled_twice(
    queueing: QueueingServiceStub,
) -> None:
    """The lease ends behind the handler's back, as it does when a stream breaks."""
    handled, go_on = 0, asyncio.Event()
    seen: list[pb.Delivery] = []

    async def handle(delivery: pb.Delivery) -> None:
        nonlocal handled
        handled += 1
        seen.append(delivery)
        await go_on.wait()

    short = pb.Subscription(name="short", topic="jobs")
    short.ack_deadline.FromSeconds(1)
    await queueing.CreateSubscription(pb.CreateSubscriptionRequest(subscription=short))
    await publish(queueing, b"a")
    async with plexus.client.Subscriber(queueing, "short", handle) as subscriber:
        await until(lambda: handled == 1)
        extension = pb.Extension(ack_id=seen[0].ack_id)  # ends at once
        await queueing.ModifyAckDeadline(
            pb.ModifyAckDeadlineRequest(subscription="short", extensions=[extension])
        )
        await until(lambda: any(ack_id != seen[0].ack_id for ack_id in subscriber._leases))
        go_on.set()
    assert handled == 1
    left = await stats(queueing, "short")
    assert (left.ready, left.leased, left.delayed, left.dead) == (0, 0, 0, 0)
