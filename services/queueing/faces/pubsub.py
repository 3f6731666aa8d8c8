"""google.pubsub.v1 on the domain: what official clients of Google Pub/Sub call.

The messages are those of the google-cloud-pubsub package. What is not supported is refused with
UNIMPLEMENTED, never taken and ignored.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import empty_pb2
from google.pubsub_v1.types import pubsub as types

from services.queueing.domain import MAX_BATCH, Position, Refusal
from services.queueing.faces import pubsub_convert as convert
from services.queueing.faces.pubsub_names import is_of, own, project, theirs
from services.queueing.faces.pubsub_stream import Outstanding, PullStream
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.queueing.domain import Broker
    from services.queueing.resources import Subscription

_PULL_WAIT_S = 30.0
_PULL_MARGIN_S = 1.0
_STEP = 1000
_TOPIC_MUTABLE = ("labels", "message_retention_duration")
_SUBSCRIPTION_MUTABLE = (
    "ack_deadline_seconds",
    "labels",
    "dead_letter_policy",
    "retry_policy",
    "message_retention_duration",
    "push_config",
    "expiration_policy",
    "enable_exactly_once_delivery",
)


def _merge(present: Any, request_message: Any, mask: Any, mutable: Sequence[str]) -> None:
    if not mask.paths:
        raise InvalidArgumentError("must name what changes", field="update_mask")
    for path in mask.paths:
        if path.split(".")[0] not in mutable:
            raise InvalidArgumentError(f"{path!r} cannot be changed", field="update_mask")
    mask.MergeMessage(request_message, present, True, True)  # noqa: FBT003 - replaces messages and repeated fields


def _deadline(seconds: int) -> int:
    if not 0 <= seconds <= convert.MAX_DEADLINE_S:
        raise InvalidArgumentError("must be 0 to 600", field="ack_deadline_seconds")
    return seconds


class Publisher:
    """google.pubsub.v1.Publisher."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def create_topic(self, request: Any, context: Any) -> Any:
        """A topic; with retention it keeps a log."""
        del context
        return convert.topic_to(await self._broker.create_topic(convert.topic_from(request)))

    async def get_topic(self, request: Any, context: Any) -> Any:
        """One."""
        del context
        return convert.topic_to(await self._broker.get_topic(own(request.topic, "topics", "topic")))

    async def update_topic(self, request: Any, context: Any) -> Any:
        """Labels and retention."""
        del context
        name = own(request.topic.name, "topics", "topic.name")
        topic = convert.topic_to(await self._broker.get_topic(name))
        _merge(topic, request.topic, request.update_mask, _TOPIC_MUTABLE)
        return convert.topic_to(await self._broker.update_topic(convert.topic_from(topic)))

    async def publish(self, request: Any, context: Any) -> Any:
        """Durable when answered."""
        del context
        messages = [convert.message_from(message, n) for n, message in enumerate(request.messages)]
        ids = await self._broker.publish(own(request.topic, "topics", "topic"), messages)
        return types.PublishResponse.pb()(message_ids=ids)

    async def list_topics(self, request: Any, context: Any) -> Any:
        """Of one project, by name."""
        del context
        found, token = await _listed(
            lambda after: self._broker.list_topics(limit=_STEP, after=after), request, "pubsub topics"
        )
        return types.ListTopicsResponse.pb()(topics=map(convert.topic_to, found), next_page_token=token)

    async def list_topic_subscriptions(self, request: Any, context: Any) -> Any:
        """Names of all subscriptions of a topic."""
        del context
        topic = own(request.topic, "topics", "topic")
        await self._broker.get_topic(topic)
        limit = page_size(request.page_size)
        after = (decode_token(request.page_token, "topic subscriptions", topic) or b"").decode()
        found = await self._broker.list_subscriptions(topic=topic, limit=limit + 1, after=after)
        token = ""
        if len(found) > limit:
            token = encode_token(found[limit - 1].name.encode(), "topic subscriptions", topic)
        names = [theirs(subscription.name, "subscriptions") for subscription in found[:limit]]
        return types.ListTopicSubscriptionsResponse.pb()(subscriptions=names, next_page_token=token)

    async def delete_topic(self, request: Any, context: Any) -> Any:
        """Its subscriptions stay."""
        del context
        await self._broker.delete_topic(own(request.topic, "topics", "topic"))
        return empty_pb2.Empty()

    async def detach_subscription(self, request: Any, context: Any) -> Any:
        """It gets and gives nothing more."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        subscription = await self._broker.get_subscription(name)
        await self._broker.update_subscription(replace(subscription, detached=True))
        return types.DetachSubscriptionResponse.pb()()


async def _listed(
    read: Callable[[str], Awaitable[list[Any]]], request: Any, kind: str
) -> tuple[list[Any], str]:
    """A page of what is of the request's project, and the token of the next."""
    wanted, limit = project(request.project), page_size(request.page_size)
    after = (decode_token(request.page_token, kind, wanted) or b"").decode()
    found: list[Any] = []
    while len(found) <= limit:
        read_now = await read(after)
        found += [entry for entry in read_now if is_of(entry.name, wanted)]
        if len(read_now) < _STEP:
            break
        after = read_now[-1].name
    token = encode_token(found[limit - 1].name.encode(), kind, wanted) if len(found) > limit else ""
    return found[:limit], token


class Subscriber:
    """google.pubsub.v1.Subscriber."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._outstanding = Outstanding()

    async def _shown(self, subscription: Subscription) -> Any:
        try:
            await self._broker.get_topic(subscription.topic)
        except NotFoundError:
            return convert.subscription_to(subscription, topic_exists=False)
        return convert.subscription_to(subscription)

    async def create_subscription(self, request: Any, context: Any) -> Any:
        """It gets what is published from then on."""
        del context
        wanted = convert.subscription_from(request)
        return await self._shown(await self._broker.create_subscription(wanted))

    async def get_subscription(self, request: Any, context: Any) -> Any:
        """One."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        return await self._shown(await self._broker.get_subscription(name))

    async def update_subscription(self, request: Any, context: Any) -> Any:
        """What may change."""
        del context
        name = own(request.subscription.name, "subscriptions", "subscription.name")
        present = await self._broker.get_subscription(name)
        message = convert.subscription_to(present)
        _merge(message, request.subscription, request.update_mask, _SUBSCRIPTION_MUTABLE)
        changed = replace(convert.subscription_from(message), detached=present.detached)
        return await self._shown(await self._broker.update_subscription(changed))

    async def list_subscriptions(self, request: Any, context: Any) -> Any:
        """Of one project, by name."""
        del context
        found, token = await _listed(
            lambda after: self._broker.list_subscriptions(limit=_STEP, after=after),
            request,
            "pubsub subscriptions",
        )
        shown = [await self._shown(subscription) for subscription in found]
        return types.ListSubscriptionsResponse.pb()(subscriptions=shown, next_page_token=token)

    async def delete_subscription(self, request: Any, context: Any) -> Any:
        """With what it holds."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        await self._broker.delete_subscription(name)
        return empty_pb2.Empty()

    async def acknowledge(self, request: Any, context: Any) -> Any:
        """Be done; ids whose lease has ended are of no effect, as there."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        await self._acknowledge(name, list(request.ack_ids))
        return empty_pb2.Empty()

    async def _acknowledge(self, name: str, ack_ids: Sequence[str]) -> list[str]:
        expired: list[str] = []
        for start in range(0, len(ack_ids), MAX_BATCH):
            expired += await self._broker.acknowledge(name, ack_ids[start : start + MAX_BATCH])
        self._outstanding.settled(ack_ids)
        return expired

    async def modify_ack_deadline(self, request: Any, context: Any) -> Any:
        """Set when leases end; 0 is a refusal."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        seconds = _deadline(request.ack_deadline_seconds)
        await self._modify(name, [(ack_id, seconds) for ack_id in request.ack_ids])
        return empty_pb2.Empty()

    async def _modify(self, name: str, leases: Sequence[tuple[str, int]]) -> None:
        refused = [ack_id for ack_id, seconds in leases if seconds == 0]
        longer = [(ack_id, float(seconds)) for ack_id, seconds in leases if seconds]
        if refused:
            await self._broker.nack(name, [Refusal(ack_id) for ack_id in refused])
            self._outstanding.settled(refused)
        if longer:
            self._outstanding.settled(await self._broker.extend(name, longer))
            for ack_id, seconds in longer:
                self._outstanding.extended([ack_id], seconds)

    async def pull(self, request: Any, context: Any) -> Any:
        """Lease messages, waiting a while for the first."""
        name = own(request.subscription, "subscriptions", "subscription")
        if request.max_messages < 1:
            raise InvalidArgumentError("must be positive", field="max_messages")
        left = context.time_remaining()
        wait_s = _PULL_WAIT_S if left is None else min(_PULL_WAIT_S, max(0.0, left - _PULL_MARGIN_S))
        subscription = await self._broker.get_subscription(name)
        deliveries = await self._broker.pull(
            name,
            max_messages=min(request.max_messages, MAX_BATCH),
            max_bytes=convert.MAX_RESPONSE_BYTES,
            wait_s=0.0 if request.return_immediately else wait_s,
        )
        told = bool(subscription.dead_letter_topic)
        messages = [convert.received(delivery, with_attempt=told) for delivery in deliveries]
        return types.PullResponse.pb()(received_messages=messages)

    async def streaming_pull(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Messages as they come, within the client's flow control."""
        del context
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidArgumentError("the first message names the subscription", field="subscription")
        name = own(first.subscription, "subscriptions", "subscription")
        subscription = await self._broker.get_subscription(name)
        stream = PullStream(
            self._broker,
            self._outstanding,
            name,
            lease_s=float(_stream_deadline(first.stream_ack_deadline_seconds)),
            messages=first.max_outstanding_messages,
            content_bytes=first.max_outstanding_bytes,
        )
        await self._said(name, first)
        reader = asyncio.create_task(self._read(name, requests, stream))
        told = bool(subscription.dead_letter_topic)
        response = types.StreamingPullResponse.pb()
        properties = response.SubscriptionProperties(message_ordering_enabled=subscription.ordered)
        yield response(subscription_properties=properties)
        try:
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    messages = [convert.received(delivery, with_attempt=told) for delivery in batch]
                    yield response(received_messages=messages, subscription_properties=properties)
                    if reader.done():
                        reader.result()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, name: str, requests: AsyncIterator[Any], stream: PullStream) -> None:
        async for request in requests:
            if request.stream_ack_deadline_seconds:
                stream.set_lease(float(_stream_deadline(request.stream_ack_deadline_seconds)))
            await self._said(name, request)

    async def _said(self, name: str, request: Any) -> None:
        if request.ack_ids:
            await self._acknowledge(name, list(request.ack_ids))
        pairs = zip(request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True)
        leases = [(ack_id, _deadline(seconds)) for ack_id, seconds in pairs]
        if leases:
            await self._modify(name, leases)

    async def seek(self, request: Any, context: Any) -> Any:
        """To a time; snapshots there are none."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        if not request.HasField("time"):
            raise UnimplementedError("snapshots are not supported: seek to a time", reason="NO_SNAPSHOTS")
        await self._broker.seek(name, Position(time=request.time.seconds + request.time.nanos / 1e9))
        return types.SeekResponse.pb()()


def _stream_deadline(seconds: int) -> int:
    if not convert.MIN_DEADLINE_S <= seconds <= convert.MAX_DEADLINE_S:
        raise InvalidArgumentError("must be 10 to 600", field="stream_ack_deadline_seconds")
    return seconds


def _unary(method: Any, request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    message = request.pb() if hasattr(request, "pb") else request
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=message.FromString, response_serializer=_serialize
    )


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def add_to(server: grpc.aio.Server, broker: Broker) -> None:
    """Serve both services; a method that is not here is UNIMPLEMENTED by gRPC."""
    publisher, subscriber = Publisher(broker), Subscriber(broker)
    publisher_methods = {
        "CreateTopic": _unary(publisher.create_topic, types.Topic),
        "UpdateTopic": _unary(publisher.update_topic, types.UpdateTopicRequest),
        "Publish": _unary(publisher.publish, types.PublishRequest),
        "GetTopic": _unary(publisher.get_topic, types.GetTopicRequest),
        "ListTopics": _unary(publisher.list_topics, types.ListTopicsRequest),
        "ListTopicSubscriptions": _unary(
            publisher.list_topic_subscriptions, types.ListTopicSubscriptionsRequest
        ),
        "DeleteTopic": _unary(publisher.delete_topic, types.DeleteTopicRequest),
        "DetachSubscription": _unary(publisher.detach_subscription, types.DetachSubscriptionRequest),
    }
    subscriber_methods = {
        "CreateSubscription": _unary(subscriber.create_subscription, types.Subscription),
        "GetSubscription": _unary(subscriber.get_subscription, types.GetSubscriptionRequest),
        "UpdateSubscription": _unary(subscriber.update_subscription, types.UpdateSubscriptionRequest),
        "ListSubscriptions": _unary(subscriber.list_subscriptions, types.ListSubscriptionsRequest),
        "DeleteSubscription": _unary(subscriber.delete_subscription, types.DeleteSubscriptionRequest),
        "ModifyAckDeadline": _unary(subscriber.modify_ack_deadline, types.ModifyAckDeadlineRequest),
        "Acknowledge": _unary(subscriber.acknowledge, types.AcknowledgeRequest),
        "Pull": _unary(subscriber.pull, types.PullRequest),
        "Seek": _unary(subscriber.seek, types.SeekRequest),
        "StreamingPull": grpc.stream_stream_rpc_method_handler(
            subscriber.streaming_pull,
            request_deserializer=types.StreamingPullRequest.pb().FromString,
            response_serializer=_serialize,
        ),
    }
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("google.pubsub.v1.Publisher", publisher_methods),
            grpc.method_handlers_generic_handler("google.pubsub.v1.Subscriber", subscriber_methods),
        )
    )
