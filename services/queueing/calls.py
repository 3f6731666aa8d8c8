"""Calls over the broker: a request to whoever consumes a topic, and the replies to it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import structlog

from services.queueing.domain import MAX_BATCH
from services.queueing.replies import Kind, Reply, Request, reply_of
from services.queueing.resources import Subscription, Topic
from services.runtime.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PlexusError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from types import TracebackType

    from services.queueing.domain import Broker, Message

log = structlog.get_logger(__name__)

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 3600.0
PREFIX = "plexus-reply."
"""Of the topics and subscriptions that carry replies."""
ALIVE = "plexus-alive"
"""Label of a reply topic: when its owner was last there, in whole seconds since 1970."""
MAX_UNREAD = 64
"""Progress that is kept for a caller that does not read; the oldest is dropped."""
_BEAT_S = 60.0
_ABANDONED_S = 15 * 60.0
"""Ten and more missed beats: enough for clocks that disagree."""
_PULL_WAIT_S = 30.0
_PULL_BYTES = 32 * 1024 * 1024
_RETRY_S = 1.0
_CLOSE_S = 5.0


@dataclass(slots=True)
class _Waiting:
    """A call in progress: what came for it and was not told yet."""

    progress: deque[Reply] = field(default_factory=lambda: deque(maxlen=MAX_UNREAD))
    final: Reply | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, reply: Reply) -> None:
        if self.final is not None:
            return  # the first one counts
        if reply.final:
            self.final = reply
        else:
            self.progress.append(reply)
        self.news.set()


class Calls:
    """The callers of this process and the one channel of their replies; open it with `async with`.

    The channel is a topic and a subscription of its own, made at the first call and deleted at the end. A
    process that was killed, of the service or of a client with a channel of its own, leaves them behind: they
    are deleted here when their owner was silent for long.
    """

    def __init__(self, broker: Broker) -> None:
        """Set it up; nothing is made before the first call."""
        self._broker = broker
        self._channel = f"{PREFIX}{uuid.uuid4().hex}"
        self._waiting: dict[str, _Waiting] = {}
        self._opening = asyncio.Lock()
        self._made = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Begin to delete abandoned channels."""
        self._tasks.append(asyncio.create_task(self._beat()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and delete the channel if the broker answers in time."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._made:
            return
        with suppress(PlexusError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._delete(self._channel)

    async def call(
        self, topic: str, message: Message, timeout_s: float, *, published: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[Reply]:
        """Publish a request and give its replies: progress, then one result.

        Args:
            topic: Whose consumers are asked.
            message: The request; it is given up when the time is over.
            timeout_s: How long to wait for the result, up to an hour.
            published: Called when the request is on its way.

        Raises:
            NotFoundError: No such topic.
            FailedPreconditionError: Nobody subscribes to it.
            DeadlineExceededError: The time was over before there was a result.
            PlexusError: The worker's error, by its code.
        """
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidArgumentError(f"must be up to {MAX_TIMEOUT_S:g} s", field="timeout")
        call_id, waiting = uuid.uuid4().hex, _Waiting()
        request = Request(self._channel, call_id, time.time() + timeout_s)
        asked = replace(
            message, attributes={**message.attributes, **request.attributes()}, ttl_s=timeout_s, delay_s=0.0
        )
        self._waiting[call_id] = waiting
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await self._check_heard(topic, asked)
                await self._open()
                await self._broker.publish(topic, [asked])
                await published()
            ends = limit.when()
            while True:
                async with asyncio.timeout_at(ends):
                    await waiting.news.wait()
                waiting.news.clear()
                while waiting.progress:
                    yield waiting.progress.popleft()
                if waiting.final is not None:
                    break
        except TimeoutError:
            raise DeadlineExceededError(
                f"no result in {timeout_s:.3g} s", metadata={"topic": topic, "call_id": call_id}
            ) from None
        finally:
            del self._waiting[call_id]
        if waiting.final.kind is Kind.ERROR:
            raise waiting.final.error({"topic": topic, "call_id": call_id})
        yield waiting.final

    async def _check_heard(self, topic: str, message: Message) -> None:
        if not any(s.wants(message.attributes) for s in await self._broker.subscribers(topic)):
            raise FailedPreconditionError(
                f"nobody subscribes to topic {topic!r}, so nobody would answer",
                reason="NO_SUBSCRIBERS",
                metadata={"topic": topic},
            )

    # The channel.

    async def _open(self) -> None:
        async with self._opening:
            if not self._made:
                await self._make()
                self._made = True
                self._tasks.append(asyncio.create_task(self._receive()))

    async def _make(self) -> None:
        with suppress(AlreadyExistsError):
            await self._broker.create_topic(Topic(self._channel, labels={ALIVE: str(int(time.time()))}))
        # Ordered: a worker that gives its replies a key keeps them in order; and it needs but one queue.
        await self._broker.create_subscription(Subscription(self._channel, self._channel, ordered=True))

    async def _receive(self) -> None:
        """Hand replies to their callers, for ever; what belongs to no caller any more is dropped."""
        while True:
            try:
                deliveries = await self._broker.pull(
                    self._channel, max_messages=MAX_BATCH, max_bytes=_PULL_BYTES, wait_s=_PULL_WAIT_S
                )
                for delivery in deliveries:
                    reply = reply_of(delivery.message.attributes, delivery.data)
                    waiting = self._waiting.get(reply.call_id) if reply is not None else None
                    if reply is not None and waiting is not None:
                        waiting.take(reply)
                if deliveries:
                    await self._broker.acknowledge(self._channel, [each.ack_id for each in deliveries])
            except PlexusError as error:
                log.warning("replies_not_received", reason=error.reason)
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
                if isinstance(error, NotFoundError):  # somebody deleted it
                    with suppress(PlexusError):
                        await self._make()

    async def _beat(self) -> None:
        """Say now and then that the channel has an owner, and delete those that have none, for ever."""
        while True:
            try:
                await self._sweep()
                await asyncio.sleep(_BEAT_S)
                if not self._made:
                    continue
                topic = await self._broker.get_topic(self._channel)
                await self._broker.update_topic(replace(topic, labels={ALIVE: str(int(time.time()))}))
            except PlexusError as error:
                log.warning("reply_channel_not_kept", reason=error.reason)
                await asyncio.sleep(_BEAT_S)

    async def _sweep(self) -> None:
        abandoned = str(int(time.time() - _ABANDONED_S))
        after = PREFIX
        while topics := await self._broker.list_topics(limit=100, after=after):
            for topic in topics:
                if not topic.name.startswith(PREFIX):
                    return
                alive = topic.labels.get(ALIVE, "")
                if topic.name != self._channel and alive.isdecimal() and int(alive) < int(abandoned):
                    await self._delete(topic.name)
                    log.info("reply_channel_deleted", topic=topic.name)
            after = topics[-1].name

    async def _delete(self, channel: str) -> None:
        for delete in (self._broker.delete_subscription, self._broker.delete_topic):
            with suppress(NotFoundError):
                await delete(channel)
