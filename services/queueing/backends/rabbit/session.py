"""What the parts of a window share: its subscription, and what the channel of the moment holds."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from services.queueing.backends.rabbit.holding import Holding
from services.queueing.backends.rabbit.link import BROKEN, interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from services.queueing.backends.rabbit.acks import Acks
    from services.queueing.backends.rabbit.held import Held
    from services.queueing.backends.rabbit.state import Parked
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Priority, Subscription


class Settling(Protocol):
    """Where messages go that do not stay with the broker; durable when a call returns."""

    async def defer(self, subscription: Subscription, carried: Carried, due: float) -> None:
        """Keep a message until its time."""
        ...

    async def bury(self, subscription: Subscription, carried: Carried, reason: str) -> None:
        """Give a message up."""
        ...

    async def finish(self, subscription: Subscription, arrived: Sequence[Carried]) -> None:
        """Remember that deliveries of deduplicated messages are over, given as they arrived."""
        ...

    async def settled(self, subscription: Subscription, arrived: Sequence[Carried]) -> list[bool]:
        """For each message that came, whether it was finished, deferred or buried before."""
        ...

    async def park(self, subscription: Subscription, entries: Sequence[Parked]) -> None:
        """Keep messages in the lines of their keys.

        Raises:
            UnavailableError: The state cannot be reached, or the subscription is another replica's now.
        """
        ...

    async def unpark(self, subscription: Subscription, arrived: Sequence[Carried]) -> None:
        """Take messages that are over from their lines, given as they arrived, and remember that."""
        ...

    async def lines(self, subscription: Subscription) -> tuple[Mapping[str, int], int]:
        """How many messages wait in the line of each key, and the last position of all."""
        ...

    async def parked(
        self, subscription: Subscription, lines: Mapping[str, int], *, limit: int
    ) -> dict[str, list[Parked]]:
        """Messages of keys' lines, in order, each line after a position."""
        ...

    async def pass_over(self, subscription: Subscription) -> dict[str, list[int]]:
        """Forget messages of lines that Seek has passed over; the positions of the others, by key."""
        ...

    async def recall(self, subscription: Subscription, arrived: Sequence[Carried]) -> list[Carried | None]:
        """Messages of lines, given as they arrived; none for what is there no more."""
        ...

    async def declare(self, subscription: Subscription) -> None:
        """Make the subscription's queues and bindings.

        Raises:
            NotFoundError: Somebody deleted the subscription.
        """
        ...


class Session:
    """One channel: what came over it and is not settled; thrown away with it."""

    def __init__(self, *, ordered: bool, acks: Acks | None = None) -> None:
        """Nothing has come; without `acks` nothing ever will."""
        self.holding = Holding(ordered=ordered)
        self.arrived = asyncio.Event()
        self.out = 0
        """Messages that the broker counts as out."""
        self.entered: dict[Priority, float] = {}
        """When the last message that came of each queue was put there, seconds since 1970."""
        self._acks = acks

    @property
    def alive(self) -> bool:
        """Whether the channel is there; without it the broker delivers everything unsettled again."""
        return self._acks is not None

    def end(self) -> None:
        """The channel is gone."""
        self._acks = None

    async def tell(self, entries: Sequence[Held]) -> bool:
        """Acknowledge messages to the broker; false if it may deliver them again."""
        tags = self._tags(entries)
        if not tags:
            return True
        if self._acks is None:
            return False
        try:
            await self._acks.send(tags)
        except BROKEN:
            return False
        except asyncio.CancelledError:
            if interrupted():
                return False
            raise
        return True

    async def give_back(self, entries: Sequence[Held]) -> None:
        """Let the broker deliver messages again, to anybody.

        Raises:
            link.BROKEN: The channel is gone, and the broker delivers again in any case.
        """
        if self._acks is not None:
            await self._acks.give_back(self._tags(entries))

    def _tags(self, entries: Sequence[Held]) -> list[int]:
        """Their numbers, each of which the broker is told once."""
        tags = [held.tag for held in entries if held.tag]
        for held in entries:
            held.tag = 0
        self.out -= len(tags)
        return tags


@dataclass(slots=True)
class Current:
    """What is replaced in the life of a window: settings when they change, the session with its channel."""

    subscription: Subscription
    session: Session
    numbers: Iterator[int] = field(default_factory=itertools.count)
    errands: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is something to write to the state or to read there, see Aside."""
