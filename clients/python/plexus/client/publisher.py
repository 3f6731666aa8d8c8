"""Publishing as a stream: bounded, batched, and repeated until it is durable or its time is over."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio

from plexus.client.failures import Problem, problem
from plexus.client.retrying import TRANSIENT, pause_s
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from plexus.queueing.v1 import queueing_pb2_grpc

MAX_WAITING_MESSAGES = 10_000
MAX_WAITING_BYTES = 64 * 1024 * 1024
BATCH_MESSAGES = 1000
BATCH_BYTES = 2 * 1024 * 1024
MAX_MESSAGE_BYTES = 12 * 1024 * 1024
"""Of a message with everything; more does not pass a channel, whatever the service would say."""
_REQUESTS = 16
"""Batches on their way at once."""
_STREAM_S = 24 * 3600.0


def new_dedup_id() -> str:
    """A deduplication id that no other message has: what is repeated must be known as the same."""
    return uuid.uuid4().hex


class PublishError(Exception):
    """A message was not published, or nobody knows whether it was.

    Attributes:
        problem: What the service said last; None if it did not answer at all.
        unknown: Whether the message may be stored nevertheless.
    """

    def __init__(self, text: str, last: Problem | None, *, unknown: bool) -> None:
        super().__init__(text)
        self.problem = last
        self.unknown = unknown


class _Entry:
    __slots__ = ("alone", "deadline", "done", "message", "settled", "size", "tried")

    def __init__(self, message: pb.Message, size: int, deadline: float) -> None:
        self.message = message
        self.size = size
        self.deadline = deadline
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.alone = False  # in a request of its own, since a request with others was refused
        self.tried = False
        self.settled = False


class Publisher:
    """Publishes to one topic; use it with `async with`, which waits at its end until everything is settled.

    Messages are sent in batches over one stream, as many together as there are. When the stream breaks, what
    has no answer is sent again under the same deduplication id, so that nothing is stored twice, until the
    deadline. Messages with the same ordering key are never on their way in two batches, which keeps their
    order across repetitions.

        async with plexus.client.Publisher(queueing, "orders") as publisher:
            await publisher.publish(b"order 17")
    """

    def __init__(
        self,
        stub: queueing_pb2_grpc.QueueingServiceStub,
        topic: str,
        *,
        max_messages: int = MAX_WAITING_MESSAGES,
        max_bytes: int = MAX_WAITING_BYTES,
        deadline_s: float = 60.0,
    ) -> None:
        """Set the bounds.

        Args:
            stub: A QueueingService stub.
            topic: Its name.
            max_messages: Messages that may wait for their answer; `send` waits for room.
            max_bytes: The same in bytes; one message is always taken.
            deadline_s: How long a message is tried.
        """
        self._stub = stub
        self._topic = topic
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._deadline_s = deadline_s
        self._ready: deque[_Entry] = deque()
        self._blocked: dict[str, deque[_Entry]] = {}  # by ordering key, while the key is on its way
        self._keys: set[str] = set()
        self._sent: deque[list[_Entry]] = deque()
        self._unsettled: deque[_Entry] = deque()  # in order of sending, and so of deadlines
        self._count = self._bytes = 0
        self._room, self._wake, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._last: Problem | None = None
        self._call: grpc.aio.StreamStreamCall[pb.StreamingPublishRequest, pb.StreamingPublishResponse] | None
        self._call = None
        self._answered = False
        self._generation = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Begin."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle what was taken and close; a cancelled program waits for nothing."""
        try:
            if kind is None or issubclass(kind, Exception):
                await self.flush()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for entry in self._unsettled:
                entry.done.cancel()

    async def publish(self, message: pb.Message | bytes) -> str:
        """Publish a message and wait until it is durable.

        Returns:
            The message's id.

        Raises:
            PublishError: It was refused, or its time is over.
        """
        return await asyncio.shield(await self.send(message))

    async def send(self, message: pb.Message | bytes) -> asyncio.Future[str]:
        """Take a message, as soon as there is room.

        Returns:
            A future of the message's id once it is durable; it fails with PublishError. One whose result
            nobody asks for reports its failure when it is collected.

        Raises:
            ValueError: The message is too large for any channel.
        """
        if isinstance(message, bytes):
            message = pb.Message(data=message, dedup_id=new_dedup_id())
        elif not message.dedup_id:
            copy = pb.Message()
            copy.CopyFrom(message)
            copy.dedup_id = new_dedup_id()
            message = copy
        size = message.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message has at most {MAX_MESSAGE_BYTES} bytes with its attributes")
        while self._count and (self._count >= self._max_messages or self._bytes + size > self._max_bytes):
            self._room.clear()
            await self._room.wait()
        entry = _Entry(message, size, time.monotonic() + self._deadline_s)
        self._count += 1
        self._bytes += entry.size
        self._idle.clear()
        self._ready.append(entry)
        self._unsettled.append(entry)
        self._wake.set()
        return entry.done

    async def flush(self) -> None:
        """Wait until every message that was taken is durable or has failed."""
        await self._idle.wait()

    # Streams.

    async def _run(self) -> None:
        failures = 0
        while True:
            while not self._ready:
                self._wake.clear()
                await self._wake.wait()
            self._answered = False
            try:
                await self._stream()
            except grpc.aio.AioRpcError as error:
                self._broke(error)
            self._send_again()
            failures = 1 if self._answered else failures + 1
            await asyncio.sleep(pause_s(failures))

    async def _stream(self) -> None:
        self._call = self._stub.StreamingPublish(self._requests(self._generation), timeout=_STREAM_S)
        try:
            async for response in self._call:
                self._answered = True
                batch = self._sent.popleft()
                self._release(batch)
                for entry, message_id in zip(batch, response.message_ids, strict=True):
                    if not entry.done.done():
                        entry.done.set_result(message_id)
                    self._settle(entry)
                self._wake.set()
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # within a task
                raise  # else the call was cancelled, by the watch
        finally:
            self._generation += 1  # gRPC may go on asking for requests of a stream that broke
            self._call.cancel()

    async def _requests(self, generation: int) -> AsyncIterator[pb.StreamingPublishRequest]:
        while self._generation == generation:
            batch = self._compose() if len(self._sent) < _REQUESTS else []
            if batch:
                self._sent.append(batch)
                messages = [entry.message for entry in batch]
                yield pb.StreamingPublishRequest(topic=self._topic, messages=messages)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _compose(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size, keys = 0, set()
        while self._ready:
            entry = self._ready[0]
            if entry.done.done():  # its time was over, or who sent it cancelled it
                self._settle(self._ready.popleft())
                continue
            key = entry.message.ordering_key
            if key in self._keys:
                self._blocked.setdefault(key, deque()).append(self._ready.popleft())
                continue
            full = len(batch) == BATCH_MESSAGES or size + entry.size > BATCH_BYTES
            if batch and (full or entry.alone or batch[0].alone):
                break
            batch.append(self._ready.popleft())
            size += entry.size
            entry.tried = True
            if key:
                keys.add(key)
        self._keys |= keys
        return batch

    def _release(self, batch: list[_Entry]) -> None:
        """Let messages go whose keys were on their way in this batch."""
        for key in {entry.message.ordering_key for entry in batch} & self._keys:
            self._keys.discard(key)
            self._ready.extendleft(reversed(self._blocked.pop(key, ())))

    def _broke(self, error: grpc.aio.AioRpcError) -> None:
        """Settle what the failure is about; everything else stays to be sent again."""
        self._last = problem(error)
        if self._last.code in TRANSIENT:
            return
        head = self._sent[0] if self._sent else self._compose()
        if self._last.code is grpc.StatusCode.INVALID_ARGUMENT and len(head) > 1:
            for entry in head:  # all or none were published: the one at fault is found alone
                entry.alone = True
        else:
            for entry in head:
                self._fail(entry, f"{self._last.code.name}: {self._last.message}", unknown=False)
        if not self._sent:
            self._sent.append(head)

    def _send_again(self) -> None:
        while self._sent:
            batch = self._sent.pop()
            self._release(batch)
            self._ready.extendleft(reversed(batch))

    # Deadlines.

    async def _watch(self) -> None:
        while True:
            if not self._unsettled:
                await asyncio.sleep(self._deadline_s / 8)
                continue
            left = self._unsettled[0].deadline - time.monotonic()
            if left > 0:
                await asyncio.sleep(min(left, self._deadline_s / 8))
                continue
            entry = self._unsettled[0]
            said = f": {self._last.message}" if self._last else ""
            self._fail(entry, f"not published in {self._deadline_s:g} s{said}", unknown=entry.tried)
            if self._sent and all(each.done.done() for each in self._sent[0]) and self._call is not None:
                self._call.cancel()  # it hangs

    def _fail(self, entry: _Entry, text: str, *, unknown: bool) -> None:
        if not entry.done.done():
            entry.done.set_exception(PublishError(text, self._last, unknown=unknown))
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        if entry.settled:
            return
        entry.settled = True
        while self._unsettled and self._unsettled[0].settled:
            self._unsettled.popleft()
        self._count -= 1
        self._bytes -= entry.size
        self._room.set()
        if not self._count:
            self._idle.set()
