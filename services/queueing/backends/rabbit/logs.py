"""The logs of topics, as RabbitMQ's streams."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aio_pika.exceptions import ChannelNotFoundEntity

from services.queueing.backends.rabbit.link import BROKEN, away, interrupted
from services.queueing.backends.rabbit.reading import batches, is_there
from services.queueing.backends.rabbit.topology import DIRECT, TOPICS, log_name, stream_arguments
from services.queueing.backends.rabbit.wire import MARKER, Carried, Packet, decode
from services.queueing.kept import Event, Events
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.resources import Topic

_PREFETCH = 500
_READ_S = 60.0
_CHUNK_S = 60.0


class Logs:
    """Makes and reads streams."""

    def __init__(self, link: Link, publisher: Publisher) -> None:
        self._link = link
        self._publisher = publisher

    async def declare(self, topic: Topic) -> None:
        """Make the stream of a topic."""
        await self._publisher.prepare()
        channel = await self._link.channel()
        name = log_name(topic.name)
        try:
            queue = await channel.declare_queue(name, durable=True, arguments=stream_arguments(topic))
            await queue.bind(TOPICS, f"*.{topic.name}")
            await queue.bind(DIRECT, name)
        except BROKEN as error:
            raise away() from error
        finally:
            if not channel.is_closed:
                await channel.close()

    async def delete(self, topic: str) -> None:
        """Delete the stream of a topic."""
        channel = await self._link.channel()
        try:
            await channel.queue_delete(log_name(topic))
        except BROKEN as error:
            raise away() from error
        finally:
            if not channel.is_closed:
                await channel.close()

    async def check(self, topic: Topic) -> None:
        """See to it that a topic's stream is there, before anything is given up for what is in it.

        Raises:
            FailedPreconditionError: Somebody deleted it.
        """
        if not await is_there(self._link, log_name(topic.name)):
            raise _gone(topic)

    async def read(self, topic: Topic, events: Events, limit: int) -> list[tuple[int, Carried]]:
        """Sequence and message, oldest first.

        The end of a stream is not told by the broker, so a marker is put there and read up to.

        Raises:
            FailedPreconditionError: The topic keeps no log, or somebody deleted it.
            UnavailableError: The broker cannot be reached, or the log was not read in time.
        """
        reading = _Reading(topic, events, limit)
        channel = await self._link.channel()
        try:
            await channel.set_qos(prefetch_count=_PREFETCH)
            queue = await channel.get_queue(log_name(topic.name), ensure=False)
            async with asyncio.timeout(_READ_S):
                start = await self._begin(topic, reading, queue)
                if start is None:
                    return []
                await queue.consume(reading.take, arguments={"x-stream-offset": start})
                await reading.done.wait()
        except ChannelNotFoundEntity:
            raise _gone(topic) from None
        except (*BROKEN, TimeoutError) as error:
            raise away("the log could not be read in time") from error
        except asyncio.CancelledError:
            if interrupted():
                raise away() from None
            raise
        finally:
            if not channel.is_closed:
                await channel.close()
        return reading.found[:limit]

    async def every(self, topic: Topic, events: Events) -> AsyncGenerator[list[Carried]]:
        """All that is there now, oldest first, some hundreds at a time.

        Raises:
            FailedPreconditionError: The topic keeps no log, or somebody deleted it.
            UnavailableError: The broker cannot be reached, or told nothing for a minute.
        """
        reading = _Reading(topic, events, 0)
        stream = log_name(topic.name)
        async with self._link.lent("the log could not be read") as channel:
            try:
                await channel.set_qos(prefetch_count=_PREFETCH)
                queue = await channel.get_queue(stream, ensure=False)
                async with asyncio.timeout(_READ_S):
                    start = await self._begin(topic, reading, queue)
            except ChannelNotFoundEntity:
                raise _gone(topic) from None
            except TimeoutError as error:
                raise away("the log could not be read in time") from error
            if start is None:
                return
            async with aclosing(batches(channel, stream, until=reading.marker, start=start)) as found:
                async for batch in found:
                    yield [carried for _, carried in filter(None, map(reading.look, batch))]

    async def _begin(self, topic: Topic, reading: _Reading, queue: AbstractQueue) -> int | datetime | None:
        """Put the marker behind all that is there; gives where to begin, None if nothing comes after that."""
        wanted = reading.events.from_sequence
        if wanted > 0:
            # What begins behind the end of a stream tells nothing, not even that.
            return wanted if await self._mark(topic, reading, queue) >= wanted else None
        await self._mark(topic, reading)
        # The broker's times are of its chunks: begin a little before, and before the marker.
        return datetime.fromtimestamp(max(0.0, min(reading.oldest, time.time()) - _CHUNK_S), UTC)

    async def _mark(self, topic: Topic, reading: _Reading, queue: AbstractQueue | None = None) -> int:
        """Put the marker behind all that is there; gives its sequence if told the queue."""
        mark = Packet(b"", {MARKER: reading.marker}, reading.marker)
        to = log_name(topic.name)
        if queue is None:
            await self._publisher.publish(DIRECT, [(to, mark)])
            return 0
        end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def take(incoming: AbstractIncomingMessage) -> None:
            if incoming.headers.get(MARKER) == reading.marker and not end.done():
                end.set_result(int(str(incoming.headers["x-stream-offset"])))
            await incoming.ack()

        following = await queue.consume(take, arguments={"x-stream-offset": "next"})
        await self._publisher.publish(DIRECT, [(to, mark)])
        found = await end
        await queue.cancel(following)
        return found


def _gone(topic: Topic) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the log of topic {topic.name!r} was deleted in RabbitMQ: set log to false and then to true, to log "
        "what comes from then on",
        reason="TOPIC_LOG_GONE",
        metadata={"topic": topic.name},
    )


class _Reading:
    """One pass along a stream, up to a marker or a number of events."""

    def __init__(self, topic: Topic, events: Events, limit: int) -> None:
        """Set it up.

        Raises:
            FailedPreconditionError: The topic keeps no log.
        """
        if not topic.log:
            raise FailedPreconditionError(
                f"topic {topic.name!r} keeps no log",
                reason="TOPIC_HAS_NO_LOG",
                metadata={"topic": topic.name},
            )
        self.events = events
        self.oldest = max(events.after, time.time() - topic.retention_s)
        self.marker = uuid.uuid4().hex
        self._limit = limit
        self.found: list[tuple[int, Carried]] = []
        self.done = asyncio.Event()

    def look(self, incoming: AbstractIncomingMessage) -> tuple[int, Carried] | None:
        """The sequence and the message, if it is wanted and no marker."""
        if MARKER in incoming.headers:
            return None
        carried, sequence = decode(incoming), int(str(incoming.headers["x-stream-offset"]))
        wanted = sequence >= self.events.from_sequence and _wanted(carried, self.events, self.oldest)
        return (sequence, carried) if wanted else None

    async def take(self, incoming: AbstractIncomingMessage) -> None:
        """Look at a message."""
        if self.done.is_set():
            return
        found = self.look(incoming)
        if found is not None:
            self.found.append(found)
        if incoming.headers.get(MARKER) == self.marker or len(self.found) >= self._limit:
            self.done.set()
        await incoming.ack()  # asks for more


def _wanted(carried: Carried, events: Events, oldest: float) -> bool:
    stored = carried.stored
    return (
        stored.published >= oldest
        and (not events.before or stored.published < events.before)
        and (not events.kind or stored.attributes.get("type") == events.kind)
        and (not events.correlation_id or stored.correlation_id == events.correlation_id)
        and (not events.ordering_key or stored.ordering_key == events.ordering_key)
    )


def event(found: tuple[int, Carried]) -> Event:
    """The domain's event."""
    return Event(found[0], found[1].stored)
