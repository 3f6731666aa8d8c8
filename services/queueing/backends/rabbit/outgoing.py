"""Messages on their way into RabbitMQ: at once, or from the state when their time has come."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from services.queueing.backends.rabbit.state import STREAM, Due
from services.queueing.backends.rabbit.store.deferred import copies
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    level_of,
    log_name,
    queue_name,
    retained_name,
    routing_key,
)
from services.queueing.backends.rabbit.wire import HEADER, Packet, encode, fresh, head
from services.queueing.identifiers import message_ids
from services.queueing.resources import Priority
from services.runtime.errors import NotFoundError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.backends.rabbit.queues import Queues
    from services.queueing.backends.rabbit.state import Deferral, Route, State
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Message
    from services.queueing.resources import Subscription

log = structlog.get_logger(__name__)

_MOVE = 1000
_RETRY_S = 0.5
_ASK_S = 0.05
_PATIENCE_S = 1.0
"""How long somebody else may be publishing the same message before we ask whether it lives."""
_ALONE_S = 60.0
_SHARED_S = 2.0
"""How often a replica looks for messages that another one deferred and did not live to deliver."""


class Outgoing:
    """Publishes."""

    def __init__(
        self,
        state: State,
        publisher: Publisher,
        queues: Queues,
        *,
        hold_s: float,
        settle_s: float,
        expect: Callable[[str, Sequence[str]], None],
        look_for: Callable[[str], Awaitable[None]],
    ) -> None:
        """Set it up.

        Args:
            state: What RabbitMQ cannot hold.
            publisher: To RabbitMQ.
            queues: In RabbitMQ.
            hold_s: How long another publisher may have a deduplication id without a confirmation.
            settle_s: How long RabbitMQ may take to have a new queue on disk.
            expect: Told the name of a subscription and the ids of messages that come to it.
            look_for: Frees what a replica, given by its lease, has reserved, if it is no more.
        """
        self._state = state
        self._publisher = publisher
        self._queues = queues
        self._hold_s = hold_s
        self._settle_s = settle_s
        self._expect = expect
        self._look_for = look_for
        self._moving = asyncio.Lock()

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """See Broker."""
        if any(message.delay_s for message in messages):
            await self._state.fresh()
        route = await self._state.route(topic)
        ids = message_ids(len(messages))
        todo = list(range(len(messages)))
        began = time.monotonic()
        asked = began
        while todo:
            # What others are publishing just now is waited for with nothing in our hands.
            others = await self._publish(route, messages, ids, todo)
            todo = list(others)
            if todo:
                now = time.monotonic()
                if now > asked + _PATIENCE_S:
                    asked = now
                    for holder in set(others.values()) - {""}:
                        await self._look_for(holder)
                if now > began + self._hold_s * 2:
                    raise UnavailableError(
                        "the same message is being published", reason="DEDUP_IN_PROGRESS", retry_after_s=1
                    )
                await asyncio.sleep(_ASK_S)
        await self._on_disk(route)
        return ids

    async def _on_disk(self, route: Route) -> None:
        """Wait until the queues are as durable as the messages in them.

        RabbitMQ confirms a message when it is on disk, and writes down a new queue some time after it has
        answered its declaration: killed in between, it has neither.
        """
        youngest = max((subscription.created for subscription in route.subscribers), default=0.0)
        left = min(self._settle_s, youngest + self._settle_s - time.time())
        if left > 0:
            await asyncio.sleep(left)

    async def _publish(
        self, route: Route, messages: Sequence[Message], ids: list[str], todo: Sequence[int]
    ) -> dict[int, str]:
        """Publish those of the messages that are ours to publish; who is publishing the others of them."""
        wanted = [number for number in todo if messages[number].dedup_id]
        if not wanted:
            await self._put(route, [(messages[number], ids[number]) for number in todo])
            return {}
        offered = dict(enumerate(ids))
        reserved = dict(
            zip(
                wanted,
                await self._state.reserve(route.topic, [(messages[n], ids[n]) for n in wanted]),
                strict=True,
            )
        )
        for number, reservation in reserved.items():
            ids[number] = reservation.message_id
        ours = [number for number in wanted if reserved[number].ours]
        going = [number for number in todo if number not in reserved or reserved[number].ours]
        try:
            # Who had the id before us may have published: what came of it is not known.
            repeated = {ids[number] for number in ours if ids[number] != offered[number]}
            await self._put(route, [(messages[number], ids[number]) for number in going], repeated)
        except BaseException:
            await self._release(route, [messages[number] for number in ours])
            raise
        if ours:
            await self._state.confirmed(route.topic, [messages[number] for number in ours])
        own = {ids[number] for number in ours}  # twice in one batch
        return {
            number: reserved[number].holder
            for number in wanted
            if not (reserved[number].ours or reserved[number].published or ids[number] in own)
        }

    async def _release(self, route: Route, messages: Sequence[Message]) -> None:
        try:
            await asyncio.shield(self._state.released(route.topic, messages))
        except PlexusError as error:
            log.warning("dedup_not_released", reason=error.reason)  # it is when its time is over

    async def _put(
        self, route: Route, messages: Sequence[tuple[Message, str]], repeated: Collection[str] = ()
    ) -> None:
        topic, keepers, now = route.topic, route.keepers, time.time()
        outgoing: list[tuple[str, Packet]] = []
        logged: list[tuple[str, Packet]] = []
        later: list[Deferral] = []
        for message, message_id in messages:
            carried = fresh(topic.name, message, message_id, now)
            takers = [taker.name for taker in route.subscribers if taker.wants(message.attributes)]
            if message.delay_s:
                later += copies(carried, takers, now + message.delay_s)
                if topic.log:
                    logged.append((log_name(topic.name), encode(carried)))
                kept = [k.stream for k in keepers if k.snapshot.keeps(topic.name, message.attributes)]
                retaining = [s.name for s in route.subscribers if s.retain_acked and s.name in takers]
                logged += [(stream, encode(carried)) for stream in (*kept, *map(retained_name, retaining))]
                continue
            if not (takers or topic.log or keepers) and self._state.shared:
                # Before a message is dropped, ask whether another replica has made a subscription.
                await self._state.fresh()
                route = await self._state.route(topic.name)
                keepers = route.keepers
                takers = [taker.name for taker in route.subscribers if taker.wants(message.attributes)]
            if takers or topic.log or keepers:
                encoded = encode(carried, repeated=message_id in repeated)
                outgoing.append((routing_key(topic.name, message.priority), encoded))
                for taker in takers:
                    self._expect(taker, [message_id])
        if outgoing:
            await self._send_to_topic(topic.name, outgoing)
        if logged:
            await self._publisher.publish(DIRECT, logged)
        if later:
            await self._state.defer(later)

    async def _send_to_topic(self, topic: str, outgoing: list[tuple[str, Packet]]) -> None:
        routed = await self._publisher.publish(TOPICS, outgoing)
        if all(routed):
            return
        await self._state.fresh()
        subscribers = (await self._state.route(topic)).subscribers
        for subscription in subscribers:  # somebody deleted queues or bindings
            await self._queues.declare(subscription)
        returned = [entry for entry, there in zip(outgoing, routed, strict=True) if not there]
        if subscribers and not all(await self._publisher.publish(TOPICS, returned)):
            raise _unroutable()

    async def deliver(self, copied: Sequence[tuple[str, Carried]]) -> None:
        """Put messages into single subscriptions' queues or streams, unless those were deleted meanwhile."""
        await self._enqueue(
            [
                Due(name, carried.stored.message_id, head(carried), carried.stored.data)
                for name, carried in copied
            ]
        )

    async def _enqueue(self, entries: Sequence[Due]) -> None:
        await self._state.fresh()
        outgoing: list[tuple[str, Packet]] = []
        subscriptions: dict[str, Subscription | None] = {}
        streams, now = set(), time.time()
        for entry in entries:
            name, said = entry.subscription, entry.head
            if name.startswith(STREAM):
                queue = name.removeprefix(STREAM)
                streams.add(queue)
            else:
                if name not in subscriptions:
                    subscriptions[name] = await self._present(name)
                subscription = subscriptions[name]
                if subscription is None:
                    continue
                self._expect(name, [entry.message_id])
                fields = json.loads(said)
                if subscription.ttl_s and not fields.get("expires"):
                    # Its time begins now, however long ago it was published.
                    said = json.dumps({**fields, "expires": now + subscription.ttl_s})
                queue = queue_name(name, level_of(subscription, Priority(fields.get("priority", 0))))
            outgoing.append((queue, Packet(entry.data, {HEADER: said}, entry.message_id)))
        routed = await self._publisher.publish(DIRECT, outgoing)
        returned = [
            entry
            for entry, there in zip(outgoing, routed, strict=True)
            if not there and entry[0] not in streams
        ]
        if returned:
            for subscription in filter(None, subscriptions.values()):
                await self._queues.declare(subscription)
            if not all(await self._publisher.publish(DIRECT, returned)):
                raise _unroutable()

    async def _present(self, name: str) -> Subscription | None:
        try:
            return await self._state.subscription(name)
        except NotFoundError:
            return None

    # What is due.

    async def move_due(self) -> None:
        """Publish all messages whose time has come; while some are forgotten, the next are published."""
        async with self._moving:
            forgetting: list[asyncio.Task[None]] = []
            try:
                while True:
                    async with AsyncExitStack() as batch:
                        due = await batch.enter_async_context(self._state.due(_MOVE))
                        await self._enqueue(due)
                        published = batch.pop_all()
                    forgetting.append(asyncio.create_task(published.aclose()))
                    if not due:
                        break
                    if len(forgetting) > 1:
                        await forgetting.pop(0)
            finally:
                failures = await asyncio.gather(*forgetting, return_exceptions=True)
            for failure in filter(None, failures):
                raise failure

    async def run(self) -> None:
        """Publish messages whose time has come, for ever."""
        bound = _SHARED_S if self._state.shared else _ALONE_S
        while True:
            news = self._state.news()
            try:
                await self.move_due()
                earliest = await self._state.earliest()
            except PlexusError as error:
                log.warning("deferred_not_delivered", reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            pause = bound
            if earliest is not None:
                left = earliest - time.time()
                # What is due and was not ours is in another replica's hands.
                pause = min(bound, left if left > 0 else _RETRY_S)
            try:
                async with asyncio.timeout(pause):
                    await news.wait()
            except TimeoutError:
                continue


def _unroutable() -> UnavailableError:
    return UnavailableError("no queue took the message", dependency="rabbitmq", reason="MESSAGE_UNROUTABLE")
