"""Snapshots: a stream each, which gets what is published, and begins with a copy of what was held.

What waits in a queue is read by a consumer that settles nothing; when its channel closes, RabbitMQ puts all
back in its place. What consumers of other replicas hold just then cannot be seen from here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING

from aio_pika.exceptions import ChannelNotFoundEntity

from services.queueing.backends.rabbit.reading import batches, is_there
from services.queueing.backends.rabbit.state import Kept
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    levels,
    queue_name,
    snapshot_arguments,
    snapshot_name,
)
from services.queueing.backends.rabbit.wire import MARKER, Carried, Packet, again, decode, encode
from services.queueing.domain import MAX_BATCH
from services.queueing.resources import MAX_SNAPSHOT_S, Snapshot, snapshot_of
from services.runtime.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.outgoing import Outgoing
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.backends.rabbit.state import State
    from services.queueing.resources import Subscription

CAPTURED = "plexus-captured"
"""Header of what was held when the snapshot was made; the rest was published since."""
_MAX_MESSAGES, _MAX_BYTES = 100_000, 256 * 1024 * 1024
_SILENCE_S = 2.0


class Snapshots:
    """Makes, restores and deletes."""

    def __init__(self, state: State, link: Link, publisher: Publisher, outgoing: Outgoing) -> None:
        self._state = state
        self._link = link
        self._publisher = publisher
        self._outgoing = outgoing

    async def create(
        self,
        name: str,
        subscription: Subscription,
        labels: dict[str, str],
        held: Callable[[], Sequence[Carried]],
    ) -> Snapshot:
        """See Broker.

        Args:
            name: Of the snapshot.
            subscription: What it is made of.
            labels: For its owner's bookkeeping.
            held: What this process holds of the subscription when it is called.

        Raises:
            ResourceExhaustedError: More waits than can be copied.
            FailedPreconditionError: Another replica consumes the ordered subscription.
        """
        await self.forget_old()
        stream = snapshot_name(uuid.uuid4().hex)
        now = time.time()
        begun = snapshot_of(name, subscription, labels, oldest=now, now=now)
        await self._state.begin_snapshot(Kept(begun, stream))
        try:
            await self._declare(begun, stream)
            captured = [
                carried for carried in await self._capture(subscription, held) if carried.wanted(subscription)
            ]
            oldest = min((carried.stored.published for carried in captured), default=0.0)
            made = snapshot_of(name, subscription, labels, oldest=oldest, now=now)
            for start in range(0, len(captured), MAX_BATCH):
                batch = [_captured(encode(carried)) for carried in captured[start : start + MAX_BATCH]]
                await self._publisher.publish(DIRECT, [(stream, message) for message in batch])
            await self._publisher.publish(DIRECT, [(stream, _marker(CAPTURED))])
            await self._state.finish_snapshot(made)
        except BaseException:
            await asyncio.shield(self._remove(Kept(begun, stream)))
            raise
        return made

    async def delete(self, name: str) -> None:
        """Delete a snapshot with what it keeps."""
        await self._remove(await self._state.snapshot(name))

    async def forget_old(self) -> None:
        """Delete what has expired, or was begun and never finished."""
        for kept in await self._state.old_snapshots():
            await self._remove(kept)

    async def _remove(self, kept: Kept) -> None:
        async with self._link.lent() as channel:
            await channel.queue_delete(kept.stream)
        await self._state.drop_snapshot(kept)

    async def check(self, kept: Kept) -> None:
        """See to it that what a snapshot keeps is there, before anything is given up for it.

        Raises:
            NotFoundError: Somebody deleted its stream.
        """
        if not await is_there(self._link, kept.stream):
            raise _gone(kept)

    async def restore(self, kept: Kept, subscription: Subscription) -> None:
        """Deliver to an emptied subscription what a snapshot keeps: first what was held, then what came."""
        captured: set[str] = set()
        async for batch in self._read(kept, until=CAPTURED):
            found = [decode(incoming) for incoming in batch if CAPTURED in incoming.headers]
            captured.update(carried.stored.message_id for carried in found)
            await self._deliver(found, kept.snapshot, subscription)
        marker = uuid.uuid4().hex
        routed = await self._publisher.publish(DIRECT, [(kept.stream, _marker(marker))])
        if not all(routed):
            raise _gone(kept)
        async for batch in self._read(kept, until=marker):
            came = [decode(i) for i in batch if CAPTURED not in i.headers and MARKER not in i.headers]
            # What was on its way while the snapshot was made may be there twice.
            fresh = [carried for carried in came if carried.stored.message_id not in captured]
            await self._deliver(fresh, kept.snapshot, subscription)

    async def _deliver(
        self, found: Sequence[Carried], snapshot: Snapshot, subscription: Subscription
    ) -> None:
        wanted = [
            carried
            for carried in found
            if subscription.wants(carried.stored.attributes)
            and snapshot.keeps(carried.stored.topic, carried.stored.attributes)
        ]
        if wanted:
            await self._outgoing.deliver([(subscription.name, again(carried)) for carried in wanted])

    async def _declare(self, snapshot: Snapshot, stream: str) -> None:
        await self._publisher.prepare()
        async with self._link.lent() as channel:
            arguments = snapshot_arguments(MAX_SNAPSHOT_S)
            queue = await channel.declare_queue(stream, durable=True, arguments=arguments)
            await queue.bind(TOPICS, f"*.{snapshot.topic}")
            await queue.bind(DIRECT, stream)

    # What is held.

    async def _capture(
        self, subscription: Subscription, held: Callable[[], Sequence[Carried]]
    ) -> list[Carried]:
        """What the subscription holds, in order.

        The state is read before the queues and after them: messages go from one to the other meanwhile, moved
        by this replica or another, and each is found in at least one of the three.
        """
        earlier = await self._state.deferred_messages(subscription.name, _MAX_MESSAGES)
        async with self._link.lent() as channel:
            queued = await self._queued(channel, subscription)
            # After the queues: what came from there in the meantime is here, or settled.
            here = held()
        # Older than what RabbitMQ has of their keys.
        lines = await self._state.parked_messages(subscription.name, _MAX_MESSAGES)
        later = await self._state.deferred_messages(subscription.name, _MAX_MESSAGES)
        different = {(c.stored.message_id, c.copy): c for c in (*lines, *here, *queued, *later, *earlier)}
        return [carried for carried in different.values() if subscription.wants(carried.stored.attributes)]

    async def _queued(self, channel: AbstractChannel, subscription: Subscription) -> list[Carried]:
        found: list[Carried] = []
        size = 0
        news = asyncio.Event()

        async def take(incoming: AbstractIncomingMessage) -> None:
            nonlocal size
            size += len(incoming.body)
            found.append(decode(incoming))
            news.set()

        await channel.set_qos(prefetch_count=0)
        expected = 0
        for level in levels(subscription):
            queue = await channel.get_queue(queue_name(subscription.name, level), ensure=True)
            if subscription.ordered and queue.declaration_result.consumer_count:
                raise FailedPreconditionError(
                    "another replica consumes the ordered subscription: its messages cannot be read",
                    reason="SUBSCRIPTION_IN_USE",
                    metadata={"subscription": subscription.name},
                )
            expected += queue.declaration_result.message_count or 0
            if expected > _MAX_MESSAGES:
                raise _too_much(subscription)
            await queue.consume(take)
        while len(found) < expected:
            news.clear()
            if size > _MAX_BYTES:
                raise _too_much(subscription)
            try:
                async with asyncio.timeout(_SILENCE_S):
                    await news.wait()
            except TimeoutError:
                break  # consumers took the rest
        return found

    # What is kept.

    async def _read(self, kept: Kept, *, until: str) -> AsyncGenerator[list[AbstractIncomingMessage]]:
        """A stream from its beginning up to a marker, a batch at a time."""
        async with self._link.lent() as channel:
            try:
                async with aclosing(batches(channel, kept.stream, until=until)) as found:
                    async for batch in found:
                        yield batch
            except ChannelNotFoundEntity:
                raise _gone(kept) from None


def _marker(value: str) -> Packet:
    return Packet(b"", {MARKER: value}, uuid.uuid4().hex)


def _captured(packet: Packet) -> Packet:
    packet.headers[CAPTURED] = 1
    return packet


def _gone(kept: Kept) -> NotFoundError:
    return NotFoundError(
        f"no snapshot {kept.snapshot.name!r}",
        reason="SNAPSHOT_NOT_FOUND",
        metadata={"snapshot": kept.snapshot.name},
    )


def _too_much(subscription: Subscription) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"more waits than a snapshot on RabbitMQ copies: {_MAX_MESSAGES} messages, {_MAX_BYTES} bytes",
        reason="SNAPSHOT_TOO_LARGE",
        metadata={"subscription": subscription.name},
    )
