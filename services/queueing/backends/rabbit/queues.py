"""The queues of subscriptions in RabbitMQ: made, emptied, cut off, deleted and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika.exceptions import ChannelNotFoundEntity

from services.queueing.backends.rabbit import retained
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    binding_key,
    levels,
    queue_arguments,
    queue_name,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.resources import Priority, Subscription


class Queues:
    """Each call uses a channel of its own, which a refusal of the broker closes.

    Raises:
        UnavailableError: From every method: the broker cannot be reached, or refuses.
    """

    def __init__(self, link: Link, publisher: Publisher) -> None:
        self._link = link
        self._publisher = publisher

    async def declare(self, subscription: Subscription) -> None:
        """Make the queues and bindings."""
        await self._publisher.prepare()
        async with self._link.lent(f"the queue of {subscription.name!r} could not be declared") as channel:
            for level in levels(subscription):
                name = queue_name(subscription.name, level)
                queue = await channel.declare_queue(
                    name, durable=True, arguments=queue_arguments(ordered=subscription.ordered)
                )
                await queue.bind(DIRECT, name)
                if not subscription.detached:
                    await queue.bind(TOPICS, binding_key(subscription, level))
            if subscription.retain_acked and not subscription.detached:
                await retained.declare(channel, subscription)

    async def delete(self, subscription: Subscription) -> None:
        """Delete the queues."""
        async with self._link.lent() as channel:
            for level in levels(subscription):
                await channel.queue_delete(queue_name(subscription.name, level))
            if subscription.retain_acked:
                await retained.delete(channel, subscription.name)

    async def forget(self, subscription: Subscription) -> None:
        """Delete what is retained of what it was done with."""
        async with self._link.lent() as channel:
            await retained.delete(channel, subscription.name)

    async def purge(self, subscription: Subscription, *, detach: bool = False) -> None:
        """Drop what waits in the queues; `detach` cuts them off from the topic before."""
        async with self._link.lent() as channel:
            for level in levels(subscription):
                queue = await channel.get_queue(queue_name(subscription.name, level), ensure=False)
                if detach:
                    await queue.unbind(TOPICS, binding_key(subscription, level))
                await queue.purge()

    async def ready(self, subscription: Subscription) -> dict[Priority, int]:
        """How many messages wait in the queues."""
        async with self._link.lent() as channel:
            queues = {
                level: await channel.get_queue(queue_name(subscription.name, level), ensure=True)
                for level in levels(subscription)
            }
            return {level: queue.declaration_result.message_count or 0 for level, queue in queues.items()}

    async def waiting(self, subscriptions: Sequence[Subscription]) -> dict[str, int]:
        """How many messages wait in the queues of each; none in those that are to be declared again."""
        counts = {subscription.name: 0 for subscription in subscriptions}
        left = [(each.name, queue_name(each.name, level)) for each in subscriptions for level in levels(each)]
        while left:
            async with self._link.lent() as channel:
                while left:
                    name, queue = left.pop()
                    try:
                        found = await channel.get_queue(queue, ensure=True)
                    except ChannelNotFoundEntity:
                        break  # which closes the channel
                    counts[name] += found.declaration_result.message_count or 0
        return counts
