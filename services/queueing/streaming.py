"""Streams: a consumer's, with leases within its flow control, taken back when it ends; and a publisher's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from services.queueing.domain import MAX_BATCH
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence, Sized

    from services.queueing.domain import Broker, Delivery, Refusal

MAX_OUTSTANDING = 10_000
DEFAULT_OUTSTANDING = 100
DEFAULT_OUTSTANDING_BYTES = 64 * 1024 * 1024
_PULL_WAIT_S = 30.0
_AHEAD = 64
"""What a consumer may say before the first of it is done."""
_GATHER_S = 0.001
_GATHER_MAX_S = 0.005
"""A batch costs more than the messages in it: after each, others gather so long for each of its messages."""

Asked = TypeVar("Asked")
Told = TypeVar("Told")


class Instructions(Protocol):
    """What a consumer says on its stream."""

    @property
    def acknowledge(self) -> Sequence[str]:
        """Messages it is done with."""
        ...

    @property
    def refusals(self) -> Sequence[Refusal]:
        """Messages it gives back."""
        ...

    @property
    def extensions(self) -> Sequence[tuple[str, float]]:
        """Leases it wants longer: id and seconds from now."""
        ...

    @property
    def drain(self) -> bool:
        """Whether it wants nothing more."""
        ...


@dataclass(frozen=True, slots=True)
class FlowControl:
    """What a consumer holds at once."""

    messages: int = DEFAULT_OUTSTANDING
    content_bytes: int = DEFAULT_OUTSTANDING_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.messages <= MAX_OUTSTANDING:
            raise InvalidArgumentError(f"must be 1 to {MAX_OUTSTANDING}", field="max_outstanding_messages")
        if self.content_bytes < 1:
            raise InvalidArgumentError("must be positive", field="max_outstanding_bytes")


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes to the consumer: messages, and ids of its own whose lease had ended."""

    deliveries: list[Delivery]
    expired: list[str]


class Consumer:
    """The state of one stream."""

    def __init__(self, broker: Broker, subscription: str, flow: FlowControl) -> None:
        self._broker = broker
        self._subscription = subscription
        self._flow = flow
        self._held: dict[str, int] = {}
        self._settling: set[str] = set()
        self._room = asyncio.Event()
        self._draining = asyncio.Event()
        # The reader stops when the consumer says more than is done, or does not take what it is sent.
        self._said: asyncio.Queue[Instructions] = asyncio.Queue(maxsize=_AHEAD)
        self._out: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(maxsize=4)

    async def run(self, instructions: AsyncIterator[Instructions]) -> AsyncIterator[Batch]:
        """Hand out messages until the consumer goes away; then its messages are free again at once."""
        works = (self._read(instructions), self._settle(), self._pull())
        tasks = [asyncio.create_task(work) for work in works]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            while (item := await self._out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # What was not settled too: of an acknowledgement that was on its way nobody was told.
            leases = [(ack_id, 0.0) for ack_id in (*self._held, *self._settling)]
            if leases:
                # Shielded: the stream's own cancellation is the usual way to get here.
                await asyncio.shield(self._broker.extend(self._subscription, leases))

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        item = error if isinstance(error, Exception) else None
        if self._out.full():
            self._out.get_nowait()  # the leases in it are still held, and freed with the rest
        self._out.put_nowait(item)

    async def _read(self, instructions: AsyncIterator[Instructions]) -> None:
        async for said in instructions:
            if said.drain:
                self._draining.set()
            # The consumer has room for others from now on, while these are being made durable.
            for ack_id in _settled(said):
                if ack_id in self._held:
                    del self._held[ack_id]
                    self._settling.add(ack_id)
                    self._room.set()
            await self._said.put(said)
        await self._said.join()

    async def _settle(self) -> None:
        """Do what the consumer says, in its order; acknowledgements that wait are made durable together."""
        while True:
            group = [await self._said.get()]
            acknowledged = list(group[0].acknowledge)
            while (
                not (group[-1].refusals or group[-1].extensions)
                and len(acknowledged) < MAX_BATCH
                and not self._said.empty()
            ):
                group.append(self._said.get_nowait())
                acknowledged += group[-1].acknowledge
            expired = await self._do(acknowledged, group[-1].refusals, group[-1].extensions)
            done = [*expired, *(ack_id for ack_id, seconds in group[-1].extensions if seconds == 0)]
            for ack_id in done:
                self._held.pop(ack_id, None)
            if done:
                self._room.set()
            for said in group:
                self._settling.difference_update(_settled(said))
            if expired:
                await self._out.put(Batch([], expired))
            for _ in group:
                self._said.task_done()

    async def _do(
        self,
        acknowledged: Sequence[str],
        refusals: Sequence[Refusal],
        extensions: Sequence[tuple[str, float]],
    ) -> list[str]:
        """Do it; gives the ids whose lease had ended."""
        expired: list[str] = []
        if acknowledged:
            expired += await self._broker.acknowledge(self._subscription, acknowledged)
        if refusals:
            expired += await self._broker.nack(self._subscription, refusals)
        if extensions:
            expired += await self._broker.extend(self._subscription, extensions)
        return expired

    async def _pull(self) -> None:
        while not self._draining.is_set():
            count = self._flow.messages - len(self._held)
            size = self._flow.content_bytes - sum(self._held.values())
            if count <= 0 or (size <= 0 and self._held):
                self._room.clear()
                await self._room.wait()
                continue
            deliveries = await self._broker.pull(
                self._subscription,
                max_messages=min(count, MAX_BATCH),
                max_bytes=max(size, 1),
                wait_s=_PULL_WAIT_S,
            )
            if deliveries and self._draining.is_set():  # asked for before
                await self._broker.extend(self._subscription, [(each.ack_id, 0.0) for each in deliveries])
            elif deliveries:
                self._held.update((delivery.ack_id, len(delivery.data)) for delivery in deliveries)
                await self._out.put(Batch(deliveries, []))
                filled = len(deliveries) == count
                await gather(len(deliveries), self._held, self._flow.messages, self._room, filled=filled)
        await asyncio.Event().wait()  # the consumer ends its stream


def _settled(said: Instructions) -> list[str]:
    """Messages that the consumer is done with, or gives back."""
    return [*said.acknowledge, *(refusal.ack_id for refusal in said.refusals)]


async def gather(handed_out: int, held: Sized, bound: int, room: asyncio.Event, *, filled: bool) -> None:
    """Wait a moment before more is handed out, so that it comes in batches.

    What comes alone is so handed out at once, and what comes fast together. A consumer that was given all it
    had room for, and has done half of what it may hold, does not wait.

    Args:
        handed_out: Messages of the last batch.
        held: What the consumer holds.
        bound: How much it may hold.
        room: Set when it holds less.
        filled: Whether the last batch was all it had room for.
    """
    until = time.monotonic() + min(handed_out * _GATHER_S, _GATHER_MAX_S)
    while (left := until - time.monotonic()) > 0:
        if not filled:
            await asyncio.sleep(left)
        elif len(held) <= bound // 2:
            return
        else:
            room.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await room.wait()


async def in_order(
    requests: AsyncIterator[Asked], work: Callable[[Asked], Awaitable[Told]], ahead: int
) -> AsyncGenerator[Told]:
    """Begin the work of each request as it comes, and give the results in the order of the requests.

    Args:
        requests: What comes.
        work: What each asks for; begun in order.
        ahead: Requests taken before the result of the first of them has been given.

    Yields:
        The results; the first failure is raised in its place, and what was begun after it is not waited for.
    """
    begun: asyncio.Queue[asyncio.Future[Told] | None] = asyncio.Queue(maxsize=ahead)

    async def read() -> None:
        try:
            async for request in requests:
                await begun.put(asyncio.ensure_future(work(request)))
        finally:
            await begun.put(None)

    reader = asyncio.create_task(read())
    try:
        while (future := await begun.get()) is not None:
            yield await future
        await reader
    finally:
        reader.cancel()
        while not begun.empty():
            rest = begun.get_nowait()
            if rest is not None and not rest.cancel() and not rest.cancelled():
                rest.exception()  # seen: the first failure has been told
        await asyncio.gather(reader, return_exceptions=True)
