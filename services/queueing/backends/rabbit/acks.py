"""Acknowledgements to RabbitMQ: one frame for as many messages as it may stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import AbstractChannel


class Acks:
    """Of one channel, whose deliveries are numbered from 1."""

    def __init__(self, channel: AbstractChannel) -> None:
        """Nothing is acknowledged yet."""
        self._channel = channel
        self._all_to = 0
        self._above: set[int] = set()

    def plan(self, tags: Sequence[int]) -> tuple[int, list[int]]:
        """Note deliveries as acknowledged.

        Returns:
            The number up to which all are to be acknowledged together, 0 for none, and those apart.
        """
        self._above.update(tags)
        while self._all_to + 1 in self._above:
            self._all_to += 1
            self._above.discard(self._all_to)
        # The last of these, since the broker refuses a number that is acknowledged already.
        together = max((tag for tag in tags if tag <= self._all_to), default=0)
        return together, [tag for tag in tags if tag > self._all_to]

    async def give_back(self, tags: Sequence[int]) -> None:
        """Let the broker deliver again, to anybody.

        Raises:
            link.BROKEN: The channel is gone, and the broker delivers again in any case.
        """
        for tag in tags:
            await self._channel.basic_nack(tag, requeue=True, wait=False)
        self.plan(tags)

    async def send(self, tags: Sequence[int]) -> None:
        """Acknowledge deliveries, each once.

        Raises:
            link.BROKEN: The channel is gone, and the broker delivers again what it has not heard of.
        """
        together, apart = self.plan(tags)
        frames = [(tag, False) for tag in apart]
        if together:
            frames.append((together, True))
        for number, (tag, multiple) in enumerate(frames, start=1):
            # Written in order: when the last one is on its way, all are.
            await self._channel.basic_ack(tag, multiple=multiple, wait=number == len(frames))
