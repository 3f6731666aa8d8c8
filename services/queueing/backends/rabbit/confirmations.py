"""What RabbitMQ says of messages that were written together.

aiormq keeps a future for each message until it is confirmed. Here many messages have one, which ends when all
of them are settled or their channel is gone; what stands in aiormq's table is a place in the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from aiormq.abc import DeliveredMessage

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from aiormq.channel import Channel


class Confirmations:
    """Of one group of messages.

    Attributes:
        done: Ends when each message is settled; fails with the channel.
    """

    def __init__(self, channel: Channel, message_ids: Sequence[str]) -> None:
        """Number messages that are about to be written, in this order."""
        self.done: asyncio.Future[object] = channel.create_future()
        self._channel = channel
        self._first = channel.delivery_tag + 1
        self._ids = message_ids
        self._left = len(message_ids)
        self._confirmed = [False] * len(message_ids)
        self._returned: set[str] = set()
        table = cast("dict[int, Any]", channel.confirmations)
        for number, message_id in enumerate(message_ids):
            tag = self._first + number
            table[tag] = _Place(self, number)
            channel.message_id_delivery_tag[message_id] = tag  # by which a returned message is found
        channel.delivery_tag += len(message_ids)

    def routed(self) -> list[bool | None]:
        """For each message whether a queue has it; None if it was refused or nothing was said of it.

        Of several with the same id, none if one was returned: which of them it was is not told.
        """
        return [
            False if message_id in self._returned else confirmed or None
            for message_id, confirmed in zip(self._ids, self._confirmed, strict=True)
        ]

    def end(self) -> None:
        """Expect nothing more; what RabbitMQ still says is passed over."""
        self.done.cancel()
        tags = self._channel.message_id_delivery_tag
        for tag, message_id in enumerate(self._ids, start=self._first):
            if tags.get(message_id) == tag:
                del tags[message_id]

    def settle(self, number: int, told: object) -> None:
        """Note what is said of a message, once: it is confirmed, returned, or refused with an error."""
        if isinstance(told, DeliveredMessage):
            self._returned.add(self._ids[number])
        else:
            self._confirmed[number] = not isinstance(told, Exception)
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result(None)


class _Place:
    """A message in aiormq's table, with what aiormq asks and tells a future."""

    __slots__ = ("_group", "_number")

    def __init__(self, group: Confirmations, number: int) -> None:
        self._group = group
        self._number = number

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._group.done.done()

    def cancelled(self) -> bool:
        """Why nobody does: aiormq logs what comes after anything else."""
        return self.done()

    def set_result(self, told: object) -> None:
        """Confirmed, or returned before that."""
        self._group.settle(self._number, told)

    def set_exception(self, told: Exception) -> None:
        """Refused."""
        self._group.settle(self._number, told)
