"""google.pubsub.v1.Subscriber on the domain."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf import empty_pb2
from google.pubsub_v1.types import pubsub as types

from services.queueing.domain import MAX_BATCH
from services.queueing.faces import pubsub_convert as convert
from services.queueing.faces.pubsub_leases import Leases, check_ids
from services.queueing.faces.pubsub_listing import listed, merge
from services.queueing.faces.pubsub_names import own, theirs
from services.queueing.faces.pubsub_stream import Outstanding, PullStream
from services.queueing.kept import Position
from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, AsyncIterator

    from services.queueing.domain import Broker, Delivery
    from services.queueing.faces.pubsub_leases import Settled
    from services.queueing.resources import Snapshot, Subscription

_PULL_WAIT_S = 30.0
_PULL_MARGIN_S = 1.0
_MUTABLE = (
    "ack_deadline_seconds",
    "labels",
    "dead_letter_policy",
    "retry_policy",
    "message_retention_duration",
    "retain_acked_messages",
    "push_config",
    "expiration_policy",
    "enable_exactly_once_delivery",
)
_SNAPSHOT_MUTABLE = ("labels", "expire_time")


class Subscriber:
    """Methods by their names there, in this language's spelling."""

    def __init__(self, broker: Broker, stopping: asyncio.Event) -> None:
        """Begin with nothing out.

        Args:
            broker: Where messages are.
            stopping: Set when the server stops.
        """
        self._broker = broker
        self._stopping = stopping
        self._outstanding = Outstanding()
        self._leases = Leases(broker, self._outstanding)

    # Subscriptions.

    async def _shown(self, subscription: Subscription) -> Any:
        try:
            topic = await self._broker.get_topic(subscription.topic)
        except NotFoundError:
            return convert.subscription_to(subscription, None)
        return convert.subscription_to(subscription, topic)

    async def create_subscription(self, request: Any, context: Any) -> Any:
        """It gets what is published from then on."""
        del context
        wanted = convert.subscription_from(request)
        try:
            await self._broker.get_subscription(wanted.name)
        except NotFoundError:
            return await self._shown(await self._broker.create_subscription(wanted))
        raise AlreadyExistsError(
            f"subscription {request.name!r} exists",
            reason="SUBSCRIPTION_EXISTS",
            metadata={"subscription": request.name},
        )

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
        message = convert.subscription_to(present, None)
        message.topic = theirs(present.topic, "topics")
        merge(message, request.subscription, request.update_mask, _MUTABLE)
        wanted = replace(convert.subscription_from(message), detached=present.detached)
        return await self._shown(await self._broker.update_subscription(wanted))

    async def list_subscriptions(self, request: Any, context: Any) -> Any:
        """Of one project, by name."""
        del context
        found, token = await listed(self._broker.list_subscriptions, request, "pubsub subscriptions")
        shown = [await self._shown(subscription) for subscription in found]
        return types.ListSubscriptionsResponse.pb()(subscriptions=shown, next_page_token=token)

    async def delete_subscription(self, request: Any, context: Any) -> Any:
        """With what it holds."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        await self._broker.delete_subscription(name)
        return empty_pb2.Empty()

    async def modify_push_config(self, request: Any, context: Any) -> Any:
        """To pull, which it is."""
        del context
        await self._broker.get_subscription(own(request.subscription, "subscriptions", "subscription"))
        convert.refuse_push(request.push_config)
        return empty_pb2.Empty()

    # Messages.

    async def _tell(self, name: str, settled: Settled) -> Any:
        """Answer: leases that had ended are told where each acknowledgement counts, as there."""
        if settled.error is not None or (await self._broker.get_subscription(name)).exactly_once:
            settled.raise_failures()
        return empty_pb2.Empty()

    async def acknowledge(self, request: Any, context: Any) -> Any:
        """Be done."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        check_ids(request.ack_ids)
        return await self._tell(name, await self._leases.acknowledge(name, request.ack_ids))

    async def modify_ack_deadline(self, request: Any, context: Any) -> Any:
        """Set when leases end; 0 is a refusal."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        check_ids(request.ack_ids)
        seconds = convert.ack_deadline(request.ack_deadline_seconds)
        return await self._tell(name, await self._leases.modify(name, request.ack_ids, seconds))

    async def pull(self, request: Any, context: Any) -> Any:
        """Lease messages, waiting a while for the first."""
        name = own(request.subscription, "subscriptions", "subscription")
        if request.max_messages < 1:
            raise InvalidArgumentError("must be positive", field="max_messages")
        left = context.time_remaining()
        wait_s = _PULL_WAIT_S if left is None else min(_PULL_WAIT_S, max(0.0, left - _PULL_MARGIN_S))
        subscription = await self._broker.get_subscription(name)
        deliveries: list[Delivery] = await self._broker.pull(
            name,
            max_messages=min(request.max_messages, MAX_BATCH),
            max_bytes=convert.MAX_RESPONSE_BYTES,
            wait_s=0.0 if request.return_immediately else wait_s,
        )
        told = bool(subscription.dead_letter_topic)
        messages = [convert.received(delivery, with_attempt=told) for delivery in deliveries]
        first = next(convert.parts(messages))
        rest = [(delivery.ack_id, 0.0) for delivery in deliveries[len(first) :]]
        if rest:
            await self._broker.extend(name, rest)
        return types.PullResponse.pb()(received_messages=first)

    async def streaming_pull(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any]:
        """Messages as they come, within the client's flow control."""
        del context
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidArgumentError("the first message names the subscription", field="subscription")
        stream = PullStream(self._broker, self._leases, self._outstanding, first, self._stopping)
        async with aclosing(stream.responses(requests)) as responses:
            async for response in responses:
                yield response

    async def seek(self, request: Any, context: Any) -> Any:
        """To a time or a snapshot."""
        del context
        name = own(request.subscription, "subscriptions", "subscription")
        position = Position(
            time=request.time.seconds + request.time.nanos / 1e9 if request.HasField("time") else None,
            snapshot=own(request.snapshot, "snapshots", "snapshot") if request.HasField("snapshot") else "",
        )
        await self._broker.seek(name, position)
        return types.SeekResponse.pb()()

    # Snapshots.

    async def _snapshot(self, snapshot: Snapshot) -> Any:
        try:
            await self._broker.get_topic(snapshot.topic)
        except NotFoundError:
            return convert.snapshot_to(snapshot, topic_exists=False)
        return convert.snapshot_to(snapshot, topic_exists=True)

    async def create_snapshot(self, request: Any, context: Any) -> Any:
        """Of what a subscription holds and what comes."""
        del context
        name = own(request.name, "snapshots", "name")
        subscription = own(request.subscription, "subscriptions", "subscription")
        made = await self._broker.create_snapshot(name, subscription, dict(request.labels))
        return await self._snapshot(made)

    async def get_snapshot(self, request: Any, context: Any) -> Any:
        """One."""
        del context
        name = own(request.snapshot, "snapshots", "snapshot")
        return await self._snapshot(await self._broker.get_snapshot(name))

    async def update_snapshot(self, request: Any, context: Any) -> Any:
        """Labels and expiry."""
        del context
        name = own(request.snapshot.name, "snapshots", "snapshot.name")
        present = await self._broker.get_snapshot(name)
        message = convert.snapshot_to(present, topic_exists=True)
        merge(message, request.snapshot, request.update_mask, _SNAPSHOT_MUTABLE)
        changed = await self._broker.update_snapshot(convert.snapshot_from(message, present))
        return await self._snapshot(changed)

    async def list_snapshots(self, request: Any, context: Any) -> Any:
        """Of one project, by name."""
        del context
        found, token = await listed(self._broker.list_snapshots, request, "pubsub snapshots")
        shown = [await self._snapshot(snapshot) for snapshot in found]
        return types.ListSnapshotsResponse.pb()(snapshots=shown, next_page_token=token)

    async def delete_snapshot(self, request: Any, context: Any) -> Any:
        """With what it keeps."""
        del context
        await self._broker.delete_snapshot(own(request.snapshot, "snapshots", "snapshot"))
        return empty_pb2.Empty()
