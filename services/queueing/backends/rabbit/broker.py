"""A Broker on RabbitMQ."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Self

import structlog

from services.queueing.backends.rabbit.link import BROKEN, Link, Publisher, away
from services.queueing.backends.rabbit.logs import ALL, Logs, event
from services.queueing.backends.rabbit.state import State, copies
from services.queueing.backends.rabbit.topology import (
    DIRECT,
    TOPICS,
    binding_key,
    level_of,
    levels,
    log_name,
    queue_arguments,
    queue_name,
    routing_key,
)
from services.queueing.backends.rabbit.window import Window
from services.queueing.backends.rabbit.wire import Carried, again, encode, fresh
from services.queueing.domain import (
    MAX_BATCH,
    DeadLetter,
    DeadLetterStats,
    Delivery,
    Event,
    Events,
    Message,
    Position,
    Redrive,
    Refusal,
    Stats,
    Where,
    check_messages,
    check_refusals,
)
from services.queueing.patterns import is_pattern
from services.queueing.resources import MAX_LEASE_S, Snapshot, Subscription, Topic
from services.runtime.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PlexusError,
    UnavailableError,
    UnimplementedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    import aio_pika
    from aio_pika.abc import AbstractChannel

log = structlog.get_logger(__name__)

_WAIT_BOUND_S = 60.0
_MOVE = 500
_RETRY_S = 0.5
_IDLE_S = 60.0


class RabbitBroker:
    """Messages in RabbitMQ, the rest in a file; open it with `async with`.

    A publish is durable when the broker has confirmed it. A batch is not one transaction: when it fails, some
    of its messages may have been stored, and a repetition with deduplication ids stores the others.
    """

    def __init__(
        self,
        url: str,
        file: Path,
        *,
        dedup_window_s: float = 600.0,
        max_waiting_writes: int = 20_000,
        heartbeat_s: int = 10,
        publish_deadline_s: float = 10.0,
    ) -> None:
        """Set it up; connections are made when needed.

        Args:
            url: `amqp://user:password@host:port/vhost`.
            file: Of the state that RabbitMQ cannot hold.
            dedup_window_s: How long deduplication ids are remembered.
            max_waiting_writes: Calls that may wait for the disk.
            heartbeat_s: A dead peer is noticed after about three of these.
            publish_deadline_s: How long a publish waits for its confirmation.
        """
        self._state = State(file, dedup_window_s=dedup_window_s, max_waiting=max_waiting_writes)
        # While the broker is short of memory or disk it stops reading from who publishes: consumers must not
        # share that fate.
        self._publishing = Link(url, name="plexus-publish", heartbeat_s=heartbeat_s)
        self._consuming = Link(url, name="plexus-consume", heartbeat_s=heartbeat_s)
        self._publisher = Publisher(self._publishing, deadline_s=publish_deadline_s)
        self._logs = Logs(self._consuming, self._publisher)
        self._windows: dict[str, Window] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._moving = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Begin to deliver what is due."""
        await self._state.__aenter__()
        for work in (self._move(), self._tidy()):
            self._tasks.append(asyncio.create_task(work))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back and close."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(window.close() for window in self._windows.values()))
        await self._consuming.close()
        await self._publishing.close()
        await self._state.__aexit__(kind, error, trace)

    # Topics and subscriptions.

    async def create_topic(self, topic: Topic) -> Topic:
        """See Broker."""
        created = await self._state.database.run(lambda: self._state.catalogue.create_topic(topic))
        if topic.log:
            try:
                await self._logs.declare(topic)
            except PlexusError:
                await self._state.database.run(lambda: self._state.catalogue.delete_topic(topic.name))
                raise
        self._state.forget_routes()
        return created

    async def get_topic(self, name: str) -> Topic:
        """See Broker."""
        return await self._state.database.run(lambda: self._state.catalogue.topic(name))

    async def update_topic(self, topic: Topic) -> Topic:
        """See Broker; what a stream keeps is fixed when it is made."""
        present = await self.get_topic(topic.name)
        kept = (present.retention_s, present.retention_bytes)
        if present.log and topic.log and (topic.retention_s, topic.retention_bytes) != kept:
            raise UnimplementedError(
                "on RabbitMQ the retention of a log is fixed when it is made", reason="RETENTION_FIXED"
            )
        if topic.log and not present.log:
            await self._logs.declare(topic)
        changed = await self._state.database.run(lambda: self._state.catalogue.update_topic(topic))
        if present.log and not topic.log:
            await self._logs.delete(topic.name)
        self._state.forget_routes()
        return changed

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """See Broker."""
        return await self._state.database.run(lambda: self._state.catalogue.topics(limit, after))

    async def delete_topic(self, name: str) -> None:
        """See Broker."""
        topic = await self.get_topic(name)
        if topic.log:
            await self._logs.delete(name)
        await self._state.database.run(lambda: self._state.catalogue.delete_topic(name))
        self._state.forget_routes()

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        created = await self._state.database.run(
            lambda: self._state.catalogue.create_subscription(subscription)
        )
        await self.declare(created)  # if it fails, the subscription is there and its window declares it again
        self._state.forget_routes()
        return created

    async def declare(self, subscription: Subscription) -> None:
        """Make the subscription's queues and bindings; see Settling."""
        await self._publisher.prepare()
        channel = await self._consuming.channel()
        try:
            for level in levels(subscription):
                name = queue_name(subscription.name, level)
                queue = await channel.declare_queue(
                    name, durable=True, arguments=queue_arguments(ordered=subscription.ordered)
                )
                await queue.bind(DIRECT, name)
                if not subscription.detached:
                    await queue.bind(TOPICS, binding_key(subscription, level))
        except BROKEN as error:
            raise away(f"the queue of {subscription.name!r} could not be declared") from error
        finally:
            await _close(channel)

    async def get_subscription(self, name: str) -> Subscription:
        """See Broker."""
        return await self._state.database.run(lambda: self._state.catalogue.subscription(name))

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        present = await self.get_subscription(subscription.name)
        changed = await self._state.database.run(
            lambda: self._state.catalogue.update_subscription(subscription)
        )
        self._state.forget_routes()
        if changed.detached and not present.detached:
            await self._close_window(changed.name)
            await self._on_queues(changed, "detach")
            await self._state.database.run(lambda: self._state.deferred.drop(changed.name))
        window = self._windows.get(changed.name)
        if window is not None:
            window.subscription = changed
        return changed

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """See Broker."""
        return await self._state.database.run(
            lambda: self._state.catalogue.subscriptions(topic, limit, after)
        )

    async def delete_subscription(self, name: str) -> None:
        """See Broker."""
        subscription = await self.get_subscription(name)

        def job() -> None:
            self._state.deferred.drop(name)
            self._state.dead.purge(name, Where())
            self._state.catalogue.delete_subscription(name)

        await self._on_queues(subscription, "delete")
        await self._state.database.run(job)
        self._state.forget_routes()
        await self._close_window(name)

    async def _on_queues(self, subscription: Subscription, what: str) -> None:
        channel = await self._consuming.channel()
        try:
            for level in levels(subscription):
                name = queue_name(subscription.name, level)
                if what == "delete":
                    await channel.queue_delete(name)
                    continue
                queue = await channel.get_queue(name, ensure=False)
                if what == "detach":
                    await queue.unbind(TOPICS, binding_key(subscription, level))
                await queue.purge()
        except BROKEN as error:
            raise away() from error
        finally:
            await _close(channel)

    async def subscribers(self, topic: str) -> list[Subscription]:
        """See Broker."""
        _, found = await self._state.route(topic)
        return list(found)

    # Publishing.

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """See Broker."""
        check_messages(messages)
        found, subscribers = await self._state.route(topic)
        ids = [uuid.uuid4().hex for _ in messages]
        published = await self._state.same(topic, messages, ids)
        now = time.time()
        outgoing: list[tuple[str, aio_pika.Message]] = []
        logged: list[tuple[str, aio_pika.Message]] = []
        later: list[tuple[str, Carried, float]] = []
        for message, message_id, known in zip(messages, ids, published, strict=True):
            if known:
                continue
            carried = fresh(topic, message, message_id, now)
            takers = [s for s in subscribers if s.wants(message.attributes)]
            if message.delay_s:
                later += [(name, copy, now + message.delay_s) for name, copy in copies(carried, takers)]
                if found.log:
                    logged.append((log_name(topic), encode(carried)))
            elif takers or found.log:
                outgoing.append((routing_key(topic, message.priority), encode(carried)))
                self._expect(takers, [message_id])
        if outgoing:
            await self._send(TOPICS, outgoing, subscribers)
        if logged:
            await self._publisher.publish(DIRECT, logged)
        if later:
            await self._state.database.run(lambda: self._state.deferred.put_all(later))
        await self._state.confirmed(topic, messages, ids)
        return ids

    def _expect(self, takers: Sequence[Subscription], message_ids: Sequence[str]) -> None:
        for taker in takers:
            window = self._windows.get(taker.name)
            if window is not None:
                window.expect(message_ids)

    async def _send(
        self, exchange: str, outgoing: list[tuple[str, aio_pika.Message]], takers: Sequence[Subscription]
    ) -> None:
        routed = await self._publisher.publish(exchange, outgoing)
        if all(routed):
            return
        for taker in takers:  # somebody deleted queues or bindings
            await self.declare(taker)
        returned = [entry for entry, there in zip(outgoing, routed, strict=True) if not there]
        if not all(await self._publisher.publish(exchange, returned)):
            raise UnavailableError(
                "no queue took the message", dependency="rabbitmq", reason="MESSAGE_UNROUTABLE"
            )

    async def _move_due(self) -> float | None:
        """Publish all messages whose time has come; says when the next one's will."""
        async with self._moving:
            while True:
                due, earliest = await self._state.database.run(lambda: self._state.deferred.due(_MOVE))
                if not due:
                    return earliest
                await self._deliver([(name, carried) for _, name, carried in due])
                await self._forget([number for number, _, _ in due])

    async def _forget(self, numbers: Sequence[int]) -> None:
        await self._state.database.run(lambda: self._state.deferred.done(numbers))

    async def _move(self) -> None:
        """Publish messages whose time has come, for ever."""
        while True:
            news = self._state.news()
            try:
                earliest = await self._move_due()
            except PlexusError as error:
                log.warning("deferred_not_delivered", reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            pause = (
                _WAIT_BOUND_S if earliest is None else min(_WAIT_BOUND_S, max(0.0, earliest - time.time()))
            )
            try:
                async with asyncio.timeout(pause):
                    await news.wait()
            except TimeoutError:
                continue

    async def _deliver(self, copied: Sequence[tuple[str, Carried]]) -> None:
        """Put messages into the queues of single subscriptions."""
        outgoing, subscriptions = [], {}
        for name, carried in copied:
            try:
                subscription = subscriptions[name] = await self.get_subscription(name)
            except NotFoundError:
                continue  # deleted meanwhile, with what it held
            self._expect([subscription], [carried.stored.message_id])
            level = level_of(subscription, carried.stored.priority)
            outgoing.append((queue_name(name, level), encode(carried)))
        if outgoing:
            await self._send(DIRECT, outgoing, list(subscriptions.values()))

    # Consuming.

    async def _window(self, name: str) -> Window:
        while True:
            window = self._windows.get(name)
            if window is None:
                subscription = await self._state.database.run(lambda: self._state.catalogue.attached(name))
                window = self._windows.get(name)
                if window is None:
                    window = self._windows[name] = Window(subscription, self._consuming, self)
                    window.open()
            await window.ready()
            if not window.closed:
                return window

    async def _close_window(self, name: str) -> None:
        window = self._windows.pop(name, None)
        if window is not None:
            await window.close()

    async def _tidy(self) -> None:
        """Give back what nobody asks for, for ever."""
        while True:
            await asyncio.sleep(_IDLE_S / 4)
            for name in [name for name, window in self._windows.items() if window.idle_s > _IDLE_S]:
                await self._close_window(name)

    async def defer(self, subscription: Subscription, carried: Carried, due: float) -> None:
        """See Settling."""
        await self._state.defer(subscription, carried, due)

    async def bury(self, subscription: Subscription, carried: Carried, reason: str) -> None:
        """See Settling."""
        await self._state.bury(subscription, carried, reason)

    async def settled(self, subscription: Subscription, message_id: str) -> bool:
        """See Settling."""
        return await self._state.settled(subscription, message_id)

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """See Broker."""
        if not 1 <= max_messages <= MAX_BATCH:
            raise InvalidArgumentError(f"must be 1 to {MAX_BATCH}", field="max_messages")
        deadline = time.monotonic() + min(wait_s, _WAIT_BOUND_S)
        while True:
            window = await self._window(subscription)
            news = window.news()
            deliveries = window.lease(max_messages, max_bytes)
            left = deadline - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            try:
                async with asyncio.timeout(left):
                    await news.wait()
            except TimeoutError:
                continue

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        """See Broker."""
        window = self._windows.get(subscription)
        if window is None:
            await self.get_subscription(subscription)
            return list(ack_ids)
        return await window.acknowledge(ack_ids)

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        """See Broker."""
        check_refusals(refusals)
        window = self._windows.get(subscription)
        if window is None:
            await self.get_subscription(subscription)
            return [refusal.ack_id for refusal in refusals]
        return await window.nack(refusals)

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """See Broker."""
        if not all(0 <= seconds <= MAX_LEASE_S for _, seconds in leases):
            raise InvalidArgumentError("must be 0 to 1 h", field="deadline")
        window = self._windows.get(subscription)
        if window is None:
            await self.get_subscription(subscription)
            return [ack_id for ack_id, _ in leases]
        return window.extend(leases)

    async def _settle(self, name: str) -> Subscription:
        subscription = await self.get_subscription(name)
        if not subscription.detached:
            await (await self._window(name)).settle()
        return subscription

    async def stats(self, subscription: str) -> Stats:
        """See Broker; without the oldest message's time, which RabbitMQ does not tell."""
        found = await self._settle(subscription)
        channel = await self._consuming.channel()
        try:
            queues = [
                await channel.get_queue(queue_name(subscription, level), ensure=True)
                for level in levels(found)
            ]
        except BROKEN as error:
            raise away() from error
        finally:
            await _close(channel)
        ready = sum(queue.declaration_result.message_count or 0 for queue in queues)
        window = self._windows.get(subscription)
        here, leased, waiting = window.counts() if window is not None else (0, 0, 0)
        delayed, dead = await self._state.database.run(
            lambda: (self._state.deferred.count(subscription), self._state.dead.stats(subscription).total)
        )
        return Stats(ready + here, leased, delayed + waiting, dead)

    # Dead letters.

    async def list_dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int = 0
    ) -> list[DeadLetter]:
        """See Broker."""
        await self._settle(subscription)
        return await self._state.database.run(
            lambda: self._state.dead.read(subscription, where, limit, after)
        )

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """See Broker."""
        await self._settle(subscription)
        return await self._state.database.run(lambda: self._state.dead.stats(subscription))

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """See Broker."""
        count = await self._state.database.run(lambda: self._state.dead.redrive(subscription, where, how))
        await self._move_due()
        return count

    async def purge(self, subscription: str, where: Where) -> int:
        """See Broker."""
        return await self._state.database.run(lambda: self._state.dead.purge(subscription, where))

    # Logs.

    async def list_events(self, topic: str, events: Events, *, limit: int) -> list[Event]:
        """See Broker."""
        found, _ = await self._state.route(topic)
        return [event(entry) for entry in await self._logs.read(found, events, limit)]

    async def replay(self, topic: str, events: Events, subscription: str) -> int:
        """See Broker."""
        found, _ = await self._state.route(topic)
        target = await self._state.database.run(lambda: self._state.catalogue.attached(subscription))
        read = await self._logs.read(found, events, ALL)
        wanted = [carried for _, carried in read if target.wants(carried.stored.attributes)]
        for start in range(0, len(wanted), MAX_BATCH):
            batch = wanted[start : start + MAX_BATCH]
            await self._deliver([(subscription, again(carried)) for carried in batch])
        return len(wanted)

    async def seek(self, subscription: str, position: Position) -> None:
        """See Broker; without a log only to now or later, since RabbitMQ's queues are not looked into."""
        if position.snapshot:
            raise _no_snapshots()
        found = await self._state.database.run(lambda: self._state.catalogue.attached(subscription))
        topic = None if is_pattern(found.topic) else await self.get_topic(found.topic)
        if topic is None or not topic.log:
            if position.time is None:
                raise FailedPreconditionError(
                    f"topic {found.topic!r} keeps no log", reason="TOPIC_HAS_NO_LOG"
                )
            if position.time < time.time():
                raise UnimplementedError(
                    "on RabbitMQ a subscription without a log is set to now or later only",
                    reason="SEEK_NEEDS_LOG",
                )
        window = await self._window(subscription)
        await self._on_queues(found, "purge")
        await window.clear()
        await self._state.database.run(lambda: self._state.deferred.drop(subscription))
        if topic is not None and topic.log:
            wanted = Events(after=position.time or 0.0, from_sequence=position.sequence or 0)
            await self.replay(topic.name, wanted, subscription)

    # Snapshots.

    async def create_snapshot(self, name: str, subscription: str, labels: dict[str, str]) -> Snapshot:
        """See Broker."""
        del name, subscription, labels
        raise _no_snapshots()

    async def get_snapshot(self, name: str) -> Snapshot:
        """See Broker."""
        del name
        raise _no_snapshots()

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """See Broker."""
        del snapshot
        raise _no_snapshots()

    async def list_snapshots(self, *, topic: str = "", limit: int, after: str = "") -> list[Snapshot]:
        """See Broker."""
        del topic, limit, after
        raise _no_snapshots()

    async def delete_snapshot(self, name: str) -> None:
        """See Broker."""
        del name
        raise _no_snapshots()


def _no_snapshots() -> UnimplementedError:
    return UnimplementedError("there are no snapshots on RabbitMQ", reason="NO_SNAPSHOTS")


async def _close(channel: AbstractChannel) -> None:
    if not channel.is_closed:
        await channel.close()
