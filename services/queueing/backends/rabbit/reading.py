"""Reading a stream up to a marker: its end is not told by the broker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aio_pika.exceptions import ChannelNotFoundEntity

from services.queueing.backends.rabbit.link import away
from services.queueing.backends.rabbit.wire import MARKER

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import datetime

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from services.queueing.backends.rabbit.link import Link

PREFETCH = 500
_READ_S = 60.0


async def is_there(link: Link, stream: str) -> bool:
    """Whether nobody has deleted a stream.

    Raises:
        UnavailableError: The broker cannot be reached.
    """
    async with link.lent() as channel:
        try:
            await channel.get_queue(stream, ensure=True)
        except ChannelNotFoundEntity:
            return False
    return True


async def batches(
    channel: AbstractChannel, stream: str, *, until: str, start: str | int | datetime = "first"
) -> AsyncGenerator[list[AbstractIncomingMessage]]:
    """Messages of a stream, at most 500 at a time; the marker, which somebody has put there, ends them.

    Args:
        channel: Of this reading's own, to be closed afterwards.
        stream: Its name.
        until: The marker.
        start: Where to begin: a word, a sequence, or a time, which means the chunk that holds it.

    Raises:
        UnavailableError: Nothing came for a minute.
    """
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    await channel.set_qos(prefetch_count=PREFETCH)
    queue = await channel.get_queue(stream, ensure=True)
    await queue.consume(arrived.put, arguments={"x-stream-offset": start})
    done = False
    while not done:
        try:
            async with asyncio.timeout(_READ_S):
                batch = [await arrived.get()]
        except TimeoutError as error:
            raise away("the stream could not be read in time") from error
        while not arrived.empty() and len(batch) < PREFETCH:
            batch.append(arrived.get_nowait())
        markers = [n for n, incoming in enumerate(batch) if incoming.headers.get(MARKER) == until]
        if markers:
            done, batch = True, batch[: markers[0]]
        yield batch
        for incoming in batch:
            await incoming.ack()  # asks for more
