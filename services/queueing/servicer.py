"""QueueingService over any Broker."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc
from services.queueing import convert
from services.queueing.domain import MAX_BATCH, MAX_DATA_BYTES
from services.queueing.streaming import (
    DEFAULT_OUTSTANDING,
    DEFAULT_OUTSTANDING_BYTES,
    Batch,
    Consumer,
    FlowControl,
)
from services.runtime.errors import InvalidArgumentError
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from services.queueing.domain import Broker, Refusal

MAX_WAIT_S = 60.0
PULL_BYTES = MAX_DATA_BYTES
"""Content of one response of Pull, below the bound of a message on the wire."""


@dataclass(frozen=True, slots=True)
class _Said:
    acknowledge: Sequence[str]
    refusals: Sequence[Refusal]
    extensions: Sequence[tuple[str, float]]


def _said(request: queueing_pb2.StreamingPullRequest) -> _Said:
    return _Said(
        list(request.acknowledge),
        convert.refusals_from(request.nack),
        convert.extensions_from(request.extend),
    )


def _count(items: Sequence[object], field: str) -> None:
    if not 1 <= len(items) <= MAX_BATCH:
        raise InvalidArgumentError(f"needs 1 to {MAX_BATCH}", field=field)


class QueueingServicer(queueing_pb2_grpc.QueueingServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def CreateTopic(self, request: queueing_pb2.CreateTopicRequest, context: Any) -> queueing_pb2.Topic:
        return convert.topic_to(await self._broker.create_topic(request.topic))

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
        messages = [convert.message_from(message) for message in request.messages]
        return queueing_pb2.PublishResponse(message_ids=await self._broker.publish(request.topic, messages))

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
        return queueing_pb2.PullResponse(deliveries=map(convert.delivery_to, deliveries))

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
        await self._broker.get_subscription(first.subscription)

        async def instructions() -> AsyncIterator[_Said]:
            yield _said(first)
            async for request in requests:
                yield _said(request)

        consumer = Consumer(self._broker, first.subscription, flow)
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
        scope = ("dead letters", request.subscription)
        after = int(decode_token(request.page_token, *scope) or b"0")
        letters = await self._broker.list_dead_letters(request.subscription, limit=limit + 1, after=after)
        token = encode_token(letters[limit - 1].id.encode(), *scope) if len(letters) > limit else ""
        return queueing_pb2.ListDeadLettersResponse(
            dead_letters=map(convert.dead_letter_to, letters[:limit]), next_page_token=token
        )

    async def RedriveDeadLetters(
        self, request: queueing_pb2.RedriveDeadLettersRequest, context: Any
    ) -> queueing_pb2.RedriveDeadLettersResponse:
        count = await self._broker.redrive(request.subscription, request.ids)
        return queueing_pb2.RedriveDeadLettersResponse(redriven=count)

    async def PurgeDeadLetters(
        self, request: queueing_pb2.PurgeDeadLettersRequest, context: Any
    ) -> queueing_pb2.PurgeDeadLettersResponse:
        count = await self._broker.purge(request.subscription, request.ids)
        return queueing_pb2.PurgeDeadLettersResponse(purged=count)

    async def GetStats(self, request: queueing_pb2.GetStatsRequest, context: Any) -> queueing_pb2.Stats:
        return convert.stats_to(await self._broker.stats(request.subscription))


def _responses(batch: Batch) -> list[queueing_pb2.StreamingPullResponse]:
    """A batch in messages that stay below the bound on the wire."""
    responses = [queueing_pb2.StreamingPullResponse(expired=batch.expired)] if batch.expired else []
    size = PULL_BYTES + 1
    for delivery in batch.deliveries:
        size += len(delivery.data)
        if size > PULL_BYTES:
            responses.append(queueing_pb2.StreamingPullResponse())
            size = len(delivery.data)
        responses[-1].deliveries.append(convert.delivery_to(delivery))
    return responses
