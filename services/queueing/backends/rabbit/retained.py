"""What subscriptions keep for Seek: a stream each, which gets what is published, acknowledged or not."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.link import away
from services.queueing.backends.rabbit.reading import batches, is_there
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    retained_arguments,
    retained_name,
)
from services.queueing.backends.rabbit.wire import MARKER, Packet, again, decode
from services.runtime.errors import FailedPreconditionError, UnimplementedError

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.outgoing import Outgoing
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.resources import Subscription

_CHUNK_S = 60.0
"""The broker's times are of its chunks: begin a little before."""


async def declare(channel: AbstractChannel, subscription: Subscription) -> None:
    """Make a subscription's stream."""
    name = retained_name(subscription.name)
    queue = await channel.declare_queue(name, durable=True, arguments=retained_arguments(subscription))
    await queue.bind(DIRECT, name)
    await queue.bind(TOPICS, f"*.{subscription.topic}")


async def delete(channel: AbstractChannel, subscription: str) -> None:
    """Delete a subscription's stream with what it keeps."""
    await channel.queue_delete(retained_name(subscription))


def check_change(present: Subscription, wanted: Subscription) -> None:
    """Apply what holds for streams, whose arguments are fixed.

    Raises:
        UnimplementedError: It would keep for longer or shorter than it does.
    """
    if present.retain_acked and wanted.retain_acked and present.ttl_s != wanted.ttl_s:
        raise UnimplementedError(
            "on RabbitMQ the ttl of a subscription that retains is fixed: set retain_acked to false, and "
            "then both again, which forgets what it retains",
            reason="RETENTION_FIXED",
        )


async def check(subscription: Subscription, link: Link) -> None:
    """See to it that what a subscription retains is there, before anything is given up for it.

    Raises:
        FailedPreconditionError: Somebody deleted its stream.
    """
    if not await is_there(link, retained_name(subscription.name)):
        raise FailedPreconditionError(
            f"what {subscription.name!r} retains was deleted in RabbitMQ: set retain_acked to false and then "
            "to true, to retain what comes from then on",
            reason="RETAINED_GONE",
            metadata={"subscription": subscription.name},
        )


async def restore(
    subscription: Subscription, published_from: float, link: Link, publisher: Publisher, outgoing: Outgoing
) -> None:
    """Deliver to an emptied subscription what was published at or after a time and is still kept.

    Raises:
        UnavailableError: The broker cannot be reached, or the stream was not read in time.
    """
    stream, marker = retained_name(subscription.name), uuid.uuid4().hex
    routed = await publisher.publish(DIRECT, [(stream, Packet(b"", {MARKER: marker}, marker))])
    if not all(routed):
        raise away(f"what {subscription.name!r} retains is being made")
    now = time.time()
    oldest = max(published_from, now - subscription.ttl_s)
    start = datetime.fromtimestamp(max(0.0, min(oldest, now) - _CHUNK_S), UTC)
    async with (
        link.lent() as channel,
        aclosing(batches(channel, stream, until=marker, start=start)) as found,
    ):
        async for batch in found:
            kept = [decode(incoming) for incoming in batch if MARKER not in incoming.headers]
            wanted = [
                again(carried)
                for carried in kept
                if carried.stored.published >= oldest and subscription.wants(carried.stored.attributes)
            ]
            if wanted:
                await outgoing.deliver([(subscription.name, carried) for carried in wanted])
