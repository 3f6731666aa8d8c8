"""QueueingService over any Broker."""

from __future__ import annotations

from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc
from services.queueing import convert
from services.queueing.calls import DEFAULT_TIMEOUT_S
from services.queueing.domain import MAX_BATCH, MAX_DATA_BYTES
from services.queueing.kept import Redrive, Where
from services.queueing.pages import fitting, page
from services.queueing.streaming import (
    DEFAULT_OUTSTANDING,
    DEFAULT_OUTSTANDING_BYTES,
    Batch,
    Consumer,
    FlowControl,
    in_order,
)
from services.runtime.errors import InvalidArgumentError, NotFoundError
from services.runtime.paging import decode_token, encode_token, page_size
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from services.queueing.calls import Calls
    from services.queueing.domain import Broker, Refusal
    from services.queueing.kept import DeadLetter, Event
    from services.queueing.replies import Reply

MAX_WAIT_S = 60.0
MAX_PUBLISHING = 256
"""Requests of a publishing stream that are taken ahead of their answers."""
PULL_BYTES = MAX_DATA_BYTES
"""Content of one response of Pull, below the bound of a message on the wire."""


@dataclass(frozen=True, slots=True)
class _Said:
    acknowledge: Sequence[str]
    refusals: Sequence[Refusal]
    extensions: Sequence[tuple[str, float]]
    drain: bool


def _said(request: queueing_pb2.StreamingPullRequest) -> _Said:
    return _Said(
        list(request.acknowledge),
        convert.refusals_from(request.nack),
        convert.extensions_from(request.extend),
        request.drain,
    )


def _trace() -> dict[str, str]:
    """What a message carries on of the call that publishes it."""
    request = current()
    return {"traceparent": request.traceparent} if request.traced else {}


def _count(items: Sequence[object], field: str) -> None:
    if not 1 <= len(items) <= MAX_BATCH:
        raise InvalidArgumentError(f"needs 1 to {MAX_BATCH}", field=field)


class QueueingServicer(queueing_pb2_grpc.QueueingServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, broker: Broker, calls: Calls) -> None:
        self._broker = broker
        self._calls = calls

    async def CreateTopic(self, request: queueing_pb2.CreateTopicRequest, context: Any) -> queueing_pb2.Topic:
        settings = queueing_pb2.Topic()
        settings.CopyFrom(request.settings)
        settings.name = request.topic
        return convert.topic_to(await self._broker.create_topic(convert.topic_from(settings)))

    async def UpdateTopic(self, request: queueing_pb2.UpdateTopicRequest, context: Any) -> queueing_pb2.Topic:
        topic = convert.topic_to(await self._broker.get_topic(request.topic.name))
        convert.merge(topic, request.topic, request.update_mask, convert.TOPIC_MUTABLE)
        return convert.topic_to(await self._broker.update_topic(convert.topic_from(topic)))

    async def GetTopic(self, request: queueing_pb2.GetTopicRequest, context: Any) -> queueing_pb2.Topic:
        return convert.topic_to(await self._broker.get_topic(request.topic))

    async def ListTopics(
        self, request: queueing_pb2.ListTopicsRequest, context: Any
    ) -> queueing_pb2.ListTopicsResponse:
        limit = page_size(request.page_size)
        after = (decode_token(request.page_token, "topics") or b"").decode()
        topics = await self._broker.list_topics(limit=limit + 1, after=after)
        token = encode_token(topics[limit - 1].name.encode(), "topics") if len(topics) > limit else ""
        return queueing_pb2.ListTopicsResponse(
            topics=map(convert.topic_to, topics[:limit]), next_page_token=token
        )

    async def DeleteTopic(
        self, request: queueing_pb2.DeleteTopicRequest, context: Any
    ) -> queueing_pb2.DeleteTopicResponse:
        await self._broker.delete_topic(request.topic)
        return queueing_pb2.DeleteTopicResponse()

    async def CreateSubscription(
        self, request: queueing_pb2.CreateSubscriptionRequest, context: Any
    ) -> queueing_pb2.Subscription:
        subscription = convert.subscription_from(request.subscription)
        return convert.subscription_to(await self._broker.create_subscription(subscription))

    async def GetSubscription(
        self, request: queueing_pb2.GetSubscriptionRequest, context: Any
    ) -> queueing_pb2.Subscription:
        return convert.subscription_to(await self._broker.get_subscription(request.subscription))

    async def UpdateSubscription(
        self, request: queueing_pb2.UpdateSubscriptionRequest, context: Any
    ) -> queueing_pb2.Subscription:
        wanted = convert.subscription_to(await self._broker.get_subscription(request.subscription.name))
        convert.merge(wanted, request.subscription, request.update_mask, convert.SUBSCRIPTION_MUTABLE)
        changed = await self._broker.update_subscription(convert.subscription_from(wanted))
        return convert.subscription_to(changed)

    async def ListSubscriptions(
        self, request: queueing_pb2.ListSubscriptionsRequest, context: Any
    ) -> queueing_pb2.ListSubscriptionsResponse:
        limit = page_size(request.page_size)
        scope = ("subscriptions", request.topic)
        after = (decode_token(request.page_token, *scope) or b"").decode()
        found = await self._broker.list_subscriptions(topic=request.topic, limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].name.encode(), *scope) if len(found) > limit else ""
        return queueing_pb2.ListSubscriptionsResponse(
            subscriptions=map(convert.subscription_to, found[:limit]), next_page_token=token
        )

    async def DeleteSubscription(
        self, request: queueing_pb2.DeleteSubscriptionRequest, context: Any
    ) -> queueing_pb2.DeleteSubscriptionResponse:
        await self._broker.delete_subscription(request.subscription)
        return queueing_pb2.DeleteSubscriptionResponse()

    async def Publish(
        self, request: queueing_pb2.PublishRequest, context: Any
    ) -> queueing_pb2.PublishResponse:
        return queueing_pb2.PublishResponse(message_ids=await self._publish(request))

    async def _publish(
        self, request: queueing_pb2.PublishRequest | queueing_pb2.StreamingPublishRequest
    ) -> list[str]:
        trace = _trace()
        messages = [
            convert.message_from(message, trace, f"messages[{position}]")
            for position, message in enumerate(request.messages)
        ]
        return await self._broker.publish(request.topic, messages)

    async def StreamingPublish(
        self, requests: AsyncIterator[queueing_pb2.StreamingPublishRequest], context: Any
    ) -> AsyncIterator[queueing_pb2.StreamingPublishResponse]:
        async with aclosing(in_order(requests, self._publish, MAX_PUBLISHING)) as answers:
            async for message_ids in answers:
                yield queueing_pb2.StreamingPublishResponse(message_ids=message_ids)

    async def Call(
        self, request: queueing_pb2.CallRequest, context: Any
    ) -> AsyncIterator[queueing_pb2.CallResponse]:
        async with aclosing(self._call(request, context)) as replies:
            async for reply in replies:
                yield convert.reply_to(reply)

    async def CallAndWait(
        self, request: queueing_pb2.CallAndWaitRequest, context: Any
    ) -> queueing_pb2.CallAndWaitResponse:
        async with aclosing(self._call(request.request, context)) as replies:
            told = [reply async for reply in replies if reply.final]
        return queueing_pb2.CallAndWaitResponse(result=convert.reply_to(told[0]).result)

    def _call(self, request: queueing_pb2.CallRequest, context: Any) -> AsyncGenerator[Reply]:
        asked = convert.seconds(request.timeout) if request.HasField("timeout") else DEFAULT_TIMEOUT_S
        remaining = current().remaining_s()
        timeout_s = asked if remaining is None else min(asked, remaining)

        async def published() -> None:
            # A call whose headers came back is not repeated by gRPC: the work would be done twice.
            await context.send_initial_metadata(())

        message = convert.request_from(request, _trace())
        return self._calls.call(request.topic, message, timeout_s, published=published)

    async def Pull(self, request: queueing_pb2.PullRequest, context: Any) -> queueing_pb2.PullResponse:
        wait_s = convert.seconds(request.wait)
        if not 0 <= wait_s <= MAX_WAIT_S:
            raise InvalidArgumentError(f"must be 0 to {MAX_WAIT_S:g} s", field="wait")
        deliveries = await self._broker.pull(
            request.subscription,
            max_messages=request.max_messages or 1,
            max_bytes=PULL_BYTES,
            wait_s=wait_s,
        )
        told, rest = fitting(map(convert.delivery_to, deliveries))
        if rest:  # attributes are not counted by brokers
            back = [(delivery.ack_id, 0.0) for delivery in rest]
            await self._broker.extend(request.subscription, back)
        return queueing_pb2.PullResponse(deliveries=told)

    async def StreamingPull(
        self, requests: AsyncIterator[queueing_pb2.StreamingPullRequest], context: Any
    ) -> AsyncIterator[queueing_pb2.StreamingPullResponse]:
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidArgumentError("the first message names the subscription", field="subscription")
        flow = FlowControl(
            first.max_outstanding_messages or DEFAULT_OUTSTANDING,
            first.max_outstanding_bytes or DEFAULT_OUTSTANDING_BYTES,
        )
        subscription = await self._broker.get_subscription(first.subscription)

        async def instructions() -> AsyncIterator[_Said]:
            yield _said(first)
            async for request in requests:
                yield _said(request)

        consumer = Consumer(self._broker, first.subscription, flow)
        alone = self._broker.hold(subscription.name) if subscription.exclusive else nullcontext()
        async with alone:
            stream = cast("AsyncGenerator[Batch]", consumer.run(instructions()))
            async with aclosing(stream) as batches:
                async for batch in batches:
                    for response in _responses(batch):
                        yield response

    async def Acknowledge(
        self, request: queueing_pb2.AcknowledgeRequest, context: Any
    ) -> queueing_pb2.AcknowledgeResponse:
        _count(request.ack_ids, "ack_ids")
        expired = await self._broker.acknowledge(request.subscription, request.ack_ids)
        return queueing_pb2.AcknowledgeResponse(expired=expired)

    async def Nack(self, request: queueing_pb2.NackRequest, context: Any) -> queueing_pb2.NackResponse:
        _count(request.refusals, "refusals")
        expired = await self._broker.nack(request.subscription, convert.refusals_from(request.refusals))
        return queueing_pb2.NackResponse(expired=expired)

    async def ModifyAckDeadline(
        self, request: queueing_pb2.ModifyAckDeadlineRequest, context: Any
    ) -> queueing_pb2.ModifyAckDeadlineResponse:
        _count(request.extensions, "extensions")
        leases = convert.extensions_from(request.extensions)
        expired = await self._broker.extend(request.subscription, leases)
        return queueing_pb2.ModifyAckDeadlineResponse(expired=expired)

    async def ListDeadLetters(
        self, request: queueing_pb2.ListDeadLettersRequest, context: Any
    ) -> queueing_pb2.ListDeadLettersResponse:
        limit = page_size(request.page_size)
        scope = ("dead letters", request.subscription, request.filter.SerializeToString().hex())
        after = int(decode_token(request.page_token, *scope) or b"0")
        where = convert.where_from((), request.filter)

        async def read(after: int, count: int) -> Sequence[DeadLetter]:
            return await self._broker.list_dead_letters(request.subscription, where, limit=count, after=after)

        letters, last = await page(
            read, convert.dead_letter_to, lambda letter: int(letter.id), after=after, limit=limit
        )
        token = "" if last is None else encode_token(str(last).encode(), *scope)
        return queueing_pb2.ListDeadLettersResponse(dead_letters=letters, next_page_token=token)

    async def GetDeadLetter(
        self, request: queueing_pb2.GetDeadLetterRequest, context: Any
    ) -> queueing_pb2.DeadLetter:
        found = await self._broker.list_dead_letters(request.subscription, Where(ids=(request.id,)), limit=1)
        if not found:
            raise NotFoundError(
                f"no dead letter {request.id!r}",
                reason="DEAD_LETTER_NOT_FOUND",
                metadata={"subscription": request.subscription, "id": request.id},
            )
        return convert.dead_letter_to(found[0])

    async def GetDeadLetterStats(
        self, request: queueing_pb2.GetDeadLetterStatsRequest, context: Any
    ) -> queueing_pb2.DeadLetterStats:
        return convert.dead_letter_stats_to(await self._broker.dead_letter_stats(request.subscription))

    async def RedriveDeadLetters(
        self, request: queueing_pb2.RedriveDeadLettersRequest, context: Any
    ) -> queueing_pb2.RedriveDeadLettersResponse:
        where = convert.where_from(request.ids, request.filter)
        how = Redrive(request.topic, request.max_per_second)
        count = await self._broker.redrive(request.subscription, where, how)
        return queueing_pb2.RedriveDeadLettersResponse(redriven=count)

    async def PurgeDeadLetters(
        self, request: queueing_pb2.PurgeDeadLettersRequest, context: Any
    ) -> queueing_pb2.PurgeDeadLettersResponse:
        where = convert.where_from(request.ids, request.filter)
        return queueing_pb2.PurgeDeadLettersResponse(
            purged=await self._broker.purge(request.subscription, where)
        )

    async def ListEvents(
        self, request: queueing_pb2.ListEventsRequest, context: Any
    ) -> queueing_pb2.ListEventsResponse:
        limit = page_size(request.page_size)
        scope = ("events", request.topic, request.filter.SerializeToString().hex())
        wanted = convert.events_from(request.filter)
        start = int(decode_token(request.page_token, *scope) or b"0")

        async def read(after: int, count: int) -> Sequence[Event]:
            some = replace(wanted, from_sequence=after + 1)
            return await self._broker.list_events(request.topic, some, limit=count)

        begin = max(start, wanted.from_sequence) - 1
        events, last = await page(
            read, convert.event_to, lambda event: event.sequence, after=begin, limit=limit
        )
        token = "" if last is None else encode_token(str(last + 1).encode(), *scope)
        return queueing_pb2.ListEventsResponse(events=events, next_page_token=token)

    async def Replay(self, request: queueing_pb2.ReplayRequest, context: Any) -> queueing_pb2.ReplayResponse:
        events = convert.events_from(request.filter)
        count = await self._broker.replay(request.topic, events, request.subscription)
        return queueing_pb2.ReplayResponse(replayed=count)

    async def Seek(self, request: queueing_pb2.SeekRequest, context: Any) -> queueing_pb2.SeekResponse:
        await self._broker.seek(request.subscription, convert.position_from(request))
        return queueing_pb2.SeekResponse()

    async def CreateSnapshot(
        self, request: queueing_pb2.CreateSnapshotRequest, context: Any
    ) -> queueing_pb2.Snapshot:
        made = await self._broker.create_snapshot(
            request.snapshot, request.subscription, dict(request.labels)
        )
        return convert.snapshot_to(made)

    async def GetSnapshot(
        self, request: queueing_pb2.GetSnapshotRequest, context: Any
    ) -> queueing_pb2.Snapshot:
        return convert.snapshot_to(await self._broker.get_snapshot(request.snapshot))

    async def UpdateSnapshot(
        self, request: queueing_pb2.UpdateSnapshotRequest, context: Any
    ) -> queueing_pb2.Snapshot:
        wanted = convert.snapshot_to(await self._broker.get_snapshot(request.snapshot.name))
        convert.merge(wanted, request.snapshot, request.update_mask, convert.SNAPSHOT_MUTABLE)
        return convert.snapshot_to(await self._broker.update_snapshot(convert.snapshot_from(wanted)))

    async def ListSnapshots(
        self, request: queueing_pb2.ListSnapshotsRequest, context: Any
    ) -> queueing_pb2.ListSnapshotsResponse:
        limit = page_size(request.page_size)
        scope = ("snapshots", request.topic)
        after = (decode_token(request.page_token, *scope) or b"").decode()
        found = await self._broker.list_snapshots(topic=request.topic, limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].name.encode(), *scope) if len(found) > limit else ""
        return queueing_pb2.ListSnapshotsResponse(
            snapshots=map(convert.snapshot_to, found[:limit]), next_page_token=token
        )

    async def DeleteSnapshot(
        self, request: queueing_pb2.DeleteSnapshotRequest, context: Any
    ) -> queueing_pb2.DeleteSnapshotResponse:
        await self._broker.delete_snapshot(request.snapshot)
        return queueing_pb2.DeleteSnapshotResponse()

    async def GetStats(self, request: queueing_pb2.GetStatsRequest, context: Any) -> queueing_pb2.Stats:
        return convert.stats_to(await self._broker.stats(request.subscription))


def _responses(batch: Batch) -> list[queueing_pb2.StreamingPullResponse]:
    """A batch in messages that stay below the bound on the wire."""
    responses = [queueing_pb2.StreamingPullResponse(expired=batch.expired)] if batch.expired else []
    rest = [convert.delivery_to(delivery) for delivery in batch.deliveries]
    while rest:
        some, rest = fitting(rest)
        responses.append(queueing_pb2.StreamingPullResponse(deliveries=some))
    return responses
