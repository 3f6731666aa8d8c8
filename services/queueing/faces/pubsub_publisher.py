"""google.pubsub.v1.Publisher on the domain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf import empty_pb2
from google.pubsub_v1.types import pubsub as types

from services.queueing.faces import pubsub_convert as convert
from services.queueing.faces.pubsub_listing import listed, merge
from services.queueing.faces.pubsub_names import own, theirs
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.queueing.domain import Broker

_MUTABLE = ("labels", "message_retention_duration")


class Publisher:
    """Methods by their names there, in this language's spelling."""

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
        merge(topic, request.topic, request.update_mask, _MUTABLE)
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
        found, token = await listed(self._broker.list_topics, request, "pubsub topics")
        return types.ListTopicsResponse.pb()(topics=map(convert.topic_to, found), next_page_token=token)

    async def list_topic_subscriptions(self, request: Any, context: Any) -> Any:
        """Names of all attached subscriptions of a topic."""
        del context
        names, token = await self._of_topic(request, "subscriptions", self._broker.list_subscriptions)
        return types.ListTopicSubscriptionsResponse.pb()(subscriptions=names, next_page_token=token)

    async def list_topic_snapshots(self, request: Any, context: Any) -> Any:
        """Names of all snapshots of a topic."""
        del context
        names, token = await self._of_topic(request, "snapshots", self._broker.list_snapshots)
        return types.ListTopicSnapshotsResponse.pb()(snapshots=names, next_page_token=token)

    async def _of_topic(
        self, request: Any, kind: str, read: Callable[..., Awaitable[list[Any]]]
    ) -> tuple[list[str], str]:
        topic = own(request.topic, "topics", "topic")
        await self._broker.get_topic(topic)
        limit = page_size(request.page_size)
        scope = (f"pubsub topic {kind}", topic)
        after = (decode_token(request.page_token, *scope) or b"").decode()
        found = await read(topic=topic, limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].name.encode(), *scope) if len(found) > limit else ""
        shown = [entry for entry in found[:limit] if not getattr(entry, "detached", False)]
        return [theirs(entry.name, kind) for entry in shown], token

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
