"""QueueingService over a real server, StreamingPull above all."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc
import pytest

from plexus.client import problem
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.servicer import QueueingServicer
from tests.contracts import hostile

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
                QueueingServicer(broker, Calls(broker)), server
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


async def test_settings_change_by_mask_and_only_those_that_may(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    wanted = pb.Subscription(name="work", labels={"a": "b"})
    wanted.ack_deadline.FromSeconds(99)
    request = pb.UpdateSubscriptionRequest(subscription=wanted)
    request.update_mask.paths.append("ack_deadline")
    changed = await stub.UpdateSubscription(request)
    assert (changed.ack_deadline.seconds, dict(changed.labels), changed.topic) == (99, {}, "jobs")
    changed = await stub.UpdateSubscription(pb.UpdateSubscriptionRequest(subscription=wanted))
    assert dict(changed.labels) == {"a": "b"}
    request.update_mask.paths[:] = ["filter"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpdateSubscription(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_retained_and_when_it_expires_are_set_kept_and_taken_back(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    wanted = pb.Subscription(name="kept", topic="jobs", retain_acked=True)
    wanted.ttl.FromSeconds(60)
    wanted.expire_after.FromSeconds(90)
    made = await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=wanted))
    assert (made.retain_acked, made.expire_after.seconds) == (True, 90)
    request = pb.UpdateSubscriptionRequest(subscription=pb.Subscription(name="kept"))
    request.update_mask.paths[:] = ["retain_acked", "expire_after"]
    changed = await stub.UpdateSubscription(request)
    assert (changed.retain_acked, changed.HasField("expire_after"), changed.ttl.seconds) == (False, False, 60)
    request.subscription.expire_after.FromMilliseconds(500)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpdateSubscription(request)
    assert [v.field for v in problem(caught.value).violations] == ["subscription.expire_after"]


async def test_a_refused_batch_names_the_message_at_fault_and_none_of_it_is_stored(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    bad = pb.Message(retry=pb.RetryPolicy(max_attempts=1001))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Publish(pb.PublishRequest(topic="jobs", messages=[pb.Message(data=b"good"), bad]))
    assert [v.field for v in problem(caught.value).violations] == ["messages[1].retry.max_attempts"]
    assert (await stub.GetStats(pb.GetStatsRequest(subscription="work"))).ready == 0


async def test_a_message_carries_the_trace_of_its_call_or_its_own(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    own = pb.Message(attributes={"traceparent": "of its own"})
    for header in (trace, "no such thing", None):
        request = pb.PublishRequest(topic="jobs", messages=[own, pb.Message()])
        await stub.Publish(request, metadata=(("traceparent", header),) if header else None)
    found = (await stub.Pull(pb.PullRequest(subscription="work", max_messages=9))).deliveries
    told = [dict(delivery.attributes) for delivery in found]
    assert told == [dict(own.attributes), {"traceparent": trace}] + [dict(own.attributes), {}] * 2


async def test_as_many_attributes_as_there_may_be_leave_room_for_the_trace(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    many = pb.Message(attributes={f"k{number}": "v" for number in range(64)})
    large = pb.Message(attributes={"key": "x" * (16 * 1024 - 3)})
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    request = pb.PublishRequest(topic="jobs", messages=[many, large])
    await stub.Publish(request, metadata=(("traceparent", trace),))
    (first, second) = (await stub.Pull(pb.PullRequest(subscription="work", max_messages=2))).deliveries
    assert [delivery.attributes.pop("traceparent") for delivery in (first, second)] == [trace, trace]
    assert (first.attributes, second.attributes) == (many.attributes, large.attributes)
    many.attributes["one"] = "more"
    large.attributes["key"] += "x"
    for refused in (many, large):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Publish(pb.PublishRequest(topic="jobs", messages=[refused]))
        assert [v.field for v in problem(caught.value).violations] == ["messages[0].attributes"]


async def test_pages_and_pulls_of_large_messages_fit_into_a_response(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await stub.CreateTopic(pb.CreateTopicRequest(topic="audit", settings=pb.Topic(log=True)))
    await stub.CreateSubscription(
        pb.CreateSubscriptionRequest(subscription=pb.Subscription(name="all", topic="audit"))
    )
    large = [pb.Message(data=b"x" * 3_000_000, attributes={"number": str(n)}) for n in range(9)]
    for message in large:
        await stub.Publish(pb.PublishRequest(topic="audit", messages=[message]))
    seen, token, pages = [], "", 0
    while token or not pages:
        events = await stub.ListEvents(pb.ListEventsRequest(topic="audit", page_token=token))
        seen += [event.attributes["number"] for event in events.events]
        token, pages = events.next_page_token, pages + 1
    assert (seen, pages) == ([str(n) for n in range(9)], 3)
    for _ in range(3):
        pulled = await stub.Pull(pb.PullRequest(subscription="all", max_messages=3))
        refusals = [pb.Refusal(ack_id=delivery.ack_id, dead=True) for delivery in pulled.deliveries]
        await stub.Nack(pb.NackRequest(subscription="all", refusals=refusals))
    seen, token = [], ""
    while token or not seen:
        request = pb.ListDeadLettersRequest(subscription="all", page_size=5, page_token=token)
        letters = await stub.ListDeadLetters(request)
        seen += [letter.attributes["number"] for letter in letters.dead_letters]
        token = letters.next_page_token
    assert seen == [str(n) for n in range(9)]


async def test_a_pull_of_many_attributes_gives_back_what_does_not_fit(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    batch = [pb.Message(attributes={"large": "x" * 16_000, "number": str(n)}) for n in range(250)]
    for start in range(4):
        for message in batch:
            message.attributes["number"] = str(int(message.attributes["number"]) + 250 * bool(start))
        await stub.Publish(pb.PublishRequest(topic="jobs", messages=batch))
    seen: list[int] = []
    while len(seen) < 1000:
        pulled = await stub.Pull(pb.PullRequest(subscription="work", max_messages=1000))
        assert {delivery.attempt for delivery in pulled.deliveries} == {1}
        seen += [int(delivery.attributes["number"]) for delivery in pulled.deliveries]
        ack_ids = [delivery.ack_id for delivery in pulled.deliveries]
        await stub.Acknowledge(pb.AcknowledgeRequest(subscription="work", ack_ids=ack_ids))
    assert sorted(seen) == list(range(1000))


async def test_a_publishing_stream_is_answered_in_order_until_a_request_fails(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    requests = [
        pb.StreamingPublishRequest(topic="jobs", messages=[pb.Message(data=b"%d" % n)]) for n in range(500)
    ]
    requests.insert(400, pb.StreamingPublishRequest(topic="nothing", messages=[pb.Message()]))
    ids: list[str] = []

    async def publish() -> None:
        async for response in stub.StreamingPublish(iter(requests)):
            ids.extend(response.message_ids)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await publish()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(ids) == 400
    pulled = await stub.Pull(pb.PullRequest(subscription="work", max_messages=400))
    assert [delivery.message_id for delivery in pulled.deliveries] == ids


async def test_an_exclusive_subscription_has_one_stream(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    only = pb.Subscription(name="only", topic="jobs", exclusive=True)
    await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=only))
    await _publish(stub, "a")

    async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(subscription="only")
        await asyncio.Event().wait()

    first = stub.StreamingPull(requests())
    response = await first.read()
    assert isinstance(response, pb.StreamingPullResponse)
    assert [delivery.data for delivery in response.deliveries] == [b"a"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StreamingPull(requests()).read()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    first.cancel()
    found: list[bytes] = []
    async with asyncio.timeout(30):
        while not found:
            second = stub.StreamingPull(requests())
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await second.read()
                assert isinstance(response, pb.StreamingPullResponse)
                found = [delivery.data for delivery in response.deliveries]
    second.cancel()
    assert found == [b"a"]


async def test_events_are_paged_replayed_and_sought(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    await stub.CreateTopic(pb.CreateTopicRequest(topic="audit", settings=pb.Topic(log=True)))
    subscription = pb.Subscription(name="reader", topic="audit")
    await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
    messages = [pb.Message(data=b"%d" % n, attributes={"type": "t"}) for n in range(5)]
    await stub.Publish(pb.PublishRequest(topic="audit", messages=messages))
    page = await stub.ListEvents(pb.ListEventsRequest(topic="audit", page_size=3))
    rest = await stub.ListEvents(
        pb.ListEventsRequest(topic="audit", page_size=3, page_token=page.next_page_token)
    )
    assert [event.data for event in (*page.events, *rest.events)] == [b"%d" % n for n in range(5)]
    assert rest.next_page_token == ""
    await stub.Seek(pb.SeekRequest(subscription="reader", sequence=rest.events[0].sequence))
    pulled = await stub.Pull(pb.PullRequest(subscription="reader", max_messages=10))
    assert [delivery.data for delivery in pulled.deliveries] == [b"3", b"4"]
    replay = pb.ReplayRequest(topic="audit", subscription="reader", filter=pb.EventFilter(type="t"))
    assert (await stub.Replay(replay)).replayed == 5


async def test_snapshots_are_made_paged_changed_and_sought(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await _publish(stub, "a", "b")
    request = pb.CreateSnapshotRequest(snapshot="one", subscription="work", labels={"k": "v"})
    one = await stub.CreateSnapshot(request)
    assert (one.topic, dict(one.labels)) == ("jobs", {"k": "v"})
    assert await stub.GetSnapshot(pb.GetSnapshotRequest(snapshot="one")) == one
    await stub.CreateSnapshot(pb.CreateSnapshotRequest(snapshot="two", subscription="work"))
    page = await stub.ListSnapshots(pb.ListSnapshotsRequest(topic="jobs", page_size=1))
    rest = await stub.ListSnapshots(
        pb.ListSnapshotsRequest(topic="jobs", page_size=1, page_token=page.next_page_token)
    )
    assert [s.name for s in (*page.snapshots, *rest.snapshots)] == ["one", "two"]
    wanted = pb.Snapshot(name="one", labels={"x": "y"})
    changed = await stub.UpdateSnapshot(pb.UpdateSnapshotRequest(snapshot=wanted))
    assert (dict(changed.labels), changed.expire_time) == ({"x": "y"}, one.expire_time)
    pulled = await stub.Pull(pb.PullRequest(subscription="work", max_messages=9))
    ack_ids = [delivery.ack_id for delivery in pulled.deliveries]
    await stub.Acknowledge(pb.AcknowledgeRequest(subscription="work", ack_ids=ack_ids))
    await stub.Seek(pb.SeekRequest(subscription="work", snapshot="one"))
    again = await stub.Pull(pb.PullRequest(subscription="work", max_messages=9))
    assert [delivery.data for delivery in again.deliveries] == [b"a", b"b"]
    await stub.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot="one"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSnapshot(pb.GetSnapshotRequest(snapshot="one"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_dead_letter_is_read_counted_and_missed(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    await _publish(stub, "bad")
    (delivery,) = (await stub.Pull(pb.PullRequest(subscription="work"))).deliveries
    refusal = pb.Refusal(ack_id=delivery.ack_id, reason="corrupt", dead=True)
    await stub.Nack(pb.NackRequest(subscription="work", refusals=[refusal]))
    stats = await stub.GetDeadLetterStats(pb.GetDeadLetterStatsRequest(subscription="work"))
    assert (stats.total, dict(stats.reasons)) == (1, {"corrupt": 1})
    listed = await stub.ListDeadLetters(
        pb.ListDeadLettersRequest(subscription="work", filter=pb.DeadLetterFilter(reason="corr"))
    )
    identifier = listed.dead_letters[0].id
    letter = await stub.GetDeadLetter(pb.GetDeadLetterRequest(subscription="work", id=identifier))
    assert (letter.data, letter.attempts, letter.reason) == (b"bad", 1, "corrupt")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetDeadLetter(pb.GetDeadLetterRequest(subscription="work", id="999"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_draining_stream_gets_nothing_more_and_keeps_what_it_has(
    stub: queueing_pb2_grpc.QueueingServiceStub,
) -> None:
    await _publish(stub, "a")
    said: asyncio.Queue[pb.StreamingPullRequest | None] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
        yield pb.StreamingPullRequest(subscription="work")
        while (request := await said.get()) is not None:
            yield request

    call = stub.StreamingPull(requests())
    responses = aiter(call)
    (held,) = (await anext(responses)).deliveries
    said.put_nowait(pb.StreamingPullRequest(drain=True, acknowledge=["invented"]))
    assert (await anext(responses)).expired == ["invented"]
    await _publish(stub, "b")
    wait = pb.PullRequest(subscription="work")
    wait.wait.FromSeconds(60)
    (other,) = (await stub.Pull(wait)).deliveries
    assert (other.data, other.attempt) == (b"b", 1)
    said.put_nowait(pb.StreamingPullRequest(acknowledge=[held.ack_id]))
    said.put_nowait(None)
    assert [response async for response in responses] == []
    stats = await stub.GetStats(pb.GetStatsRequest(subscription="work"))
    assert (stats.ready, stats.leased) == (0, 1)


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    async def restore() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.CreateTopic(pb.CreateTopicRequest(topic="jobs"))
        subscription = pb.Subscription(name="work", topic="jobs")
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
        await _publish(stub, "a")

    names = {"topic": "jobs", "subscription": "work", "snapshot": "kept", "name": "new"}
    bases = {
        "Publish": {"topic": "jobs", "messages": [{"data": "eA=="}]},
        "CallAndWait": {"request": {"topic": "jobs"}},
    }
    waiting = ("Pull", "StreamingPull", "Call", "CallAndWait")
    service = pb.DESCRIPTOR.services_by_name["QueueingService"]
    await hostile.probe(stub, service, names, bases, restore, waiting)
