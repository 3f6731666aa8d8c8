"""A Broker whose traffic is counted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from services.queueing import metrics
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Broker, Delivery, Message, Refusal


def metered(broker: Broker) -> Broker:
    """The same broker, with what goes through it in the metrics."""
    return cast("Broker", _Metered(broker))


class _Metered:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        begun = time.perf_counter()
        try:
            ids = await self._broker.publish(topic, messages)
        except PlexusError as error:
            metrics.PUBLISH_FAILURES.labels(error.reason).inc()
            raise
        metrics.PUBLISH_SECONDS.observe(time.perf_counter() - begun)
        metrics.PUBLISHED.add(topic, len(ids))
        return ids

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        deliveries = await self._broker.pull(
            subscription, max_messages=max_messages, max_bytes=max_bytes, wait_s=wait_s
        )
        if deliveries:
            metrics.DELIVERED.add(subscription, len(deliveries))
            if again := sum(delivery.attempt > 1 for delivery in deliveries):
                metrics.REDELIVERED.add(subscription, again)
        return deliveries

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        expired = await self._broker.acknowledge(subscription, ack_ids)
        metrics.ACKNOWLEDGED.add(subscription, len(ack_ids) - len(expired))
        return _late(subscription, expired)

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        expired = await self._broker.nack(subscription, refusals)
        metrics.REFUSED.add(subscription, len(refusals) - len(expired))
        return _late(subscription, expired)

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        return _late(subscription, await self._broker.extend(subscription, leases))


def _late(subscription: str, expired: list[str]) -> list[str]:
    if expired:
        metrics.LATE.add(subscription, len(expired))
    return expired
