"""Where a window's messages go that do not stay with RabbitMQ: to the state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.state import Deferral

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.queueing.backends.rabbit.queues import Queues
    from services.queueing.backends.rabbit.state import Guard, Parked, State
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Subscription


class ToState:
    """Settling by a State, see there."""

    def __init__(self, state: State, queues: Queues, guard: Callable[[str], Guard | None]) -> None:
        """Set it up.

        Args:
            state: Where messages go.
            queues: In RabbitMQ.
            guard: For transactions that only the replica may make that has a subscription, given by its name.
        """
        self._state = state
        self._queues = queues
        self._guard = guard

    async def declare(self, subscription: Subscription) -> None:
        """See Settling."""
        await self._state.fresh()
        await self._queues.declare(await self._state.subscription(subscription.name))

    async def defer(self, subscription: Subscription, carried: Carried, due: float) -> None:
        """See Settling."""
        await self._state.defer([Deferral(subscription.name, carried, due)])

    async def bury(self, subscription: Subscription, carried: Carried, reason: str) -> None:
        """See Settling."""
        await self._state.bury(subscription.name, carried, reason)

    async def finish(self, subscription: Subscription, arrived: Sequence[Carried]) -> None:
        """See Settling."""
        await self._state.finish(subscription.name, arrived)

    async def settled(self, subscription: Subscription, arrived: Sequence[Carried]) -> list[bool]:
        """See Settling."""
        return await self._state.settled(subscription.name, arrived)

    async def park(self, subscription: Subscription, entries: Sequence[Parked]) -> None:
        """See Settling."""
        await self._state.park(subscription.name, entries, self._guard(subscription.name))

    async def unpark(self, subscription: Subscription, arrived: Sequence[Carried]) -> None:
        """See Settling."""
        await self._state.unpark(subscription.name, arrived)

    async def lines(self, subscription: Subscription) -> tuple[dict[str, int], int]:
        """See Settling."""
        return await self._state.lines(subscription.name)

    async def parked(
        self, subscription: Subscription, lines: Mapping[str, int], *, limit: int
    ) -> dict[str, list[Parked]]:
        """See Settling."""
        return await self._state.parked(subscription.name, lines, limit=limit)

    async def pass_over(self, subscription: Subscription) -> dict[str, list[int]]:
        """See Settling."""
        return await self._state.pass_over_parked(subscription)

    async def recall(self, subscription: Subscription, arrived: Sequence[Carried]) -> list[Carried | None]:
        """See Settling."""
        return await self._state.recall(subscription.name, arrived)
