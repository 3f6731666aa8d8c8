"""Steps of the broker's contract."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from services.queueing.domain import Message
from services.queueing.kept import Where
from services.queueing.resources import Backoff, RetryPolicy, Subscription

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.queueing.domain import Broker, Delivery
    from services.queueing.kept import DeadLetter

AT_ONCE = RetryPolicy(Backoff.IMMEDIATE, 0, 0, max_attempts=3)


async def subscribe(broker: Broker, name: str = "work", topic: str = "jobs", **settings: Any) -> Subscription:
    return await broker.create_subscription(Subscription(name, topic, **{"retry": AT_ONCE, **settings}))


async def publish(broker: Broker, *bodies: str, **settings: Any) -> list[str]:
    return await broker.publish("jobs", [Message(body.encode(), **settings) for body in bodies])


async def pull(
    broker: Broker, name: str = "work", *, count: int = 100, max_bytes: int = 10**7, wait_s: float = 0
) -> list[Delivery]:
    return await broker.pull(name, max_messages=count, max_bytes=max_bytes, wait_s=wait_s)


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.data.decode() for delivery in deliveries]


async def arriving(broker: Broker, name: str = "work", *, count: int) -> list[str]:
    """So many messages, which may come one after the other."""
    found: list[str] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += bodies(await pull(broker, name, wait_s=10))
    return found


async def dead(broker: Broker, *, count: int, name: str = "work") -> list[DeadLetter]:
    """The dead letters of a subscription, once there are so many."""
    async with asyncio.timeout(30):
        while len(letters := await broker.list_dead_letters(name, Where(), limit=100)) < count:  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.02)
    return letters


async def again_until_there(broker: Broker, deliver: Callable[[], Awaitable[object]]) -> list[str]:
    """What a subscription with a short ttl gets; on a slow machine not at the first time."""
    async with asyncio.timeout(60):
        while True:
            await deliver()
            found = bodies(await pull(broker, wait_s=2))
            if found:
                return found


async def settled(broker: Broker, *, ready: int, name: str = "work") -> bool:
    """Wait until a subscription counts so many messages ready."""
    async with asyncio.timeout(30):
        while (await broker.stats(name)).ready != ready:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    return True
