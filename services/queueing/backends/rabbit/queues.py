"""The queues of subscriptions in RabbitMQ: made, emptied, cut off, deleted and counted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.link import BROKEN, away, interrupted
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    binding_key,
    levels,
    queue_arguments,
    queue_name,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractChannel

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.resources import Subscription


class Queues:
    """Each call uses a channel of its own, which a refusal of the broker closes.

    Raises:
        UnavailableError: From every method: the broker cannot be reached, or refuses.
    """

    def __init__(self, link: Link, publisher: Publisher) -> None:
        self._link = link
        self._publisher = publisher

    @asynccontextmanager
    async def _channel(self, why: str = "RabbitMQ cannot be reached") -> AsyncIterator[AbstractChannel]:
        channel = await self._link.channel()
        try:
            yield channel
        except BROKEN as error:
            raise away(why) from error
        except asyncio.CancelledError:
            if interrupted():
                raise away(why) from None
            raise
        finally:
            if not channel.is_closed:
                await channel.close()

    async def declare(self, subscription: Subscription) -> None:
        """Make the queues and bindings."""
        await self._publisher.prepare()
        async with self._channel(f"the queue of {subscription.name!r} could not be declared") as channel:
            for level in levels(subscription):
                name = queue_name(subscription.name, level)
                queue = await channel.declare_queue(
                    name, durable=True, arguments=queue_arguments(ordered=subscription.ordered)
                )
                await queue.bind(DIRECT, name)
                if not subscription.detached:
                    await queue.bind(TOPICS, binding_key(subscription, level))

    async def delete(self, subscription: Subscription) -> None:
        """Delete the queues."""
        async with self._channel() as channel:
            for level in levels(subscription):
                await channel.queue_delete(queue_name(subscription.name, level))

    async def purge(self, subscription: Subscription, *, detach: bool = False) -> None:
        """Drop what waits in the queues; `detach` cuts them off from the topic before."""
        async with self._channel() as channel:
            for level in levels(subscription):
                queue = await channel.get_queue(queue_name(subscription.name, level), ensure=False)
                if detach:
                    await queue.unbind(TOPICS, binding_key(subscription, level))
                await queue.purge()

    async def ready(self, subscription: Subscription) -> int:
        """How many messages wait in the queues."""
        async with self._channel() as channel:
            queues = [
                await channel.get_queue(queue_name(subscription.name, level), ensure=True)
                for level in levels(subscription)
            ]
            return sum(queue.declaration_result.message_count or 0 for queue in queues)
