"""A Broker on RabbitMQ."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

import structlog

from services.queueing.backends.rabbit import retained
from services.queueing.backends.rabbit.consuming import Consuming, Counts
from services.queueing.backends.rabbit.link import Link, end
from services.queueing.backends.rabbit.logs import Logs, event
from services.queueing.backends.rabbit.outgoing import Outgoing
from services.queueing.backends.rabbit.publisher import Publisher
from services.queueing.backends.rabbit.queues import Queues
from services.queueing.backends.rabbit.snapshots import Snapshots
from services.queueing.backends.rabbit.store import SqlState
from services.queueing.backends.rabbit.to_state import ToState
from services.queueing.backends.rabbit.wire import Carried, again
from services.queueing.domain import (
    MAX_BATCH,
    Delivery,
    Levels,
    Message,
    Refusal,
    Stats,
    check_messages,
    check_refusals,
)
from services.queueing.kept import DeadLetter, DeadLetterStats, Event, Events, Position, Redrive, Where
from services.queueing.patterns import is_pattern
from services.queueing.resources import MAX_LEASE_S, Snapshot, Subscription, Topic
from services.queueing.state.leases import SCHEMA, Leases
from services.runtime.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    PlexusError,
    UnimplementedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from services.queueing.backends.rabbit.state import State
    from services.queueing.state import Database

log = structlog.get_logger(__name__)

_WAIT_BOUND_S = 60.0
_MARGIN_S = 2.0
_TIDY_S = 15.0
_LEASE_S = 10.0
_EXAMINE_S, _LOOK_S = 2.0, 0.1


class RabbitBroker:
    """Messages in RabbitMQ, the rest in a database; open it with `async with`.

    A publish is durable when the broker has confirmed it. A batch is not one transaction: when it fails, some
    of its messages may have been stored, and a repetition with deduplication ids stores the others.
    """

    def __init__(
        self,
        url: str,
        database: Database,
        *,
        dedup_window_s: float = 600.0,
        max_waiting_writes: int = 20_000,
        heartbeat_s: int = 10,
        publish_deadline_s: float = 10.0,
        settle_s: float = 1.0,
        used: Callable[[str], None] | None = None,
        ordered_window: int = 1000,
        max_set_aside: int = 100_000,
    ) -> None:
        """Set it up; connections are made when needed.

        Args:
            url: `amqp://user:password@host:port/vhost`.
            database: Of the state that RabbitMQ cannot hold; open, and so until the end.
            dedup_window_s: How long deduplication ids are remembered.
            max_waiting_writes: Calls that may wait for the disk.
            heartbeat_s: A dead peer is noticed after about three of these.
            publish_deadline_s: How long a publish waits for its confirmation.
            settle_s: Age that a subscription has when a publish to it is acknowledged: RabbitMQ writes down
                twice a second which queues there are.
            used: Told the name of each subscription that is used.
            ordered_window: Messages of an ordered subscription that RabbitMQ delivers ahead.
            max_set_aside: Messages of an ordered subscription that wait in the database instead, since their
                keys stand still.
        """
        self._used = used or (lambda _name: None)
        hold_s = publish_deadline_s + _MARGIN_S
        self._state: State = SqlState(
            database,
            dedup_window_s=dedup_window_s,
            hold_s=hold_s,
            max_waiting=max_waiting_writes,
            holder=lambda: self._consuming.own,
        )
        # While the broker is short of memory or disk it stops reading from who publishes: consumers must not
        # share that fate.
        self._publishing = Link(url, name="plexus-publish", heartbeat_s=heartbeat_s)
        self._receiving = Link(url, name="plexus-consume", heartbeat_s=heartbeat_s)
        self._publisher = Publisher(self._publishing, deadline_s=publish_deadline_s)
        self._queues = Queues(self._receiving, self._publisher)
        leases = Leases(database, ttl_s=_LEASE_S)
        self._consuming = Consuming(
            self._state,
            self._receiving,
            self._publisher,
            ToState(self._state, self._queues, lambda name: self._consuming.guard(name)),  # noqa: PLW0108 - it is being made
            leases,
            ordered_window=ordered_window,
            max_set_aside=max_set_aside,
        )
        self._outgoing = Outgoing(
            self._state,
            self._publisher,
            self._queues,
            hold_s=hold_s,
            settle_s=settle_s,
            expect=self._consuming.expect,
            look_for=self._consuming.replicas.look_for,
        )
        self._logs = Logs(self._receiving, self._publisher)
        self._database = database
        self._snapshots = Snapshots(self._state, self._receiving, self._publisher, self._outgoing)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Begin to deliver what is due."""
        await self._database.migrate(SCHEMA)
        await self._state.__aenter__()
        self._consuming.open()
        for work in (self._outgoing.run(), self._tidy()):
            self._tasks.append(asyncio.create_task(work))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back and close."""
        await end(self._tasks)
        await self._consuming.close()
        await self._receiving.close()
        await self._publishing.close()
        await self._state.__aexit__(kind, error, trace)

    # Topics and subscriptions.

    async def create_topic(self, topic: Topic) -> Topic:
        """See Broker."""
        created = await self._state.create_topic(topic)
        if topic.log:
            try:
                await self._logs.declare(topic)
            except PlexusError:
                await self._state.delete_topic(topic.name)
                raise
        return created

    async def get_topic(self, name: str) -> Topic:
        """See Broker."""
        return await self._state.topic(name)

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
        changed = await self._state.update_topic(topic)
        if present.log and not topic.log:
            await self._logs.delete(topic.name)
        return changed

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """See Broker."""
        return await self._state.topics(limit, after)

    async def delete_topic(self, name: str) -> None:
        """See Broker."""
        topic = await self.get_topic(name)
        if topic.log:
            await self._logs.delete(name)
        await self._state.delete_topic(name)

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        created = await self._state.create_subscription(subscription)
        # If it fails, the subscription is there and its window declares it again.
        await self._queues.declare(created)
        return created

    async def get_subscription(self, name: str) -> Subscription:
        """See Broker."""
        await self._state.fresh()
        return await self._state.subscription(name)

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """See Broker."""
        self._used(subscription.name)
        present = await self.get_subscription(subscription.name)
        retained.check_change(present, subscription)
        changed = await self._state.update_subscription(subscription)
        keeps = changed.retain_acked and not changed.detached
        if present.retain_acked and not keeps:
            await self._queues.forget(changed)
        elif keeps and not present.retain_acked:
            await self._queues.declare(changed)
        if changed.detached and not present.detached:
            await self._consuming.drop(changed.name)
            await self._queues.purge(changed, detach=True)
            await self._state.drop_deferred(changed.name)
        await self._consuming.change(changed)
        return changed

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """See Broker."""
        return await self._state.subscriptions(topic, limit, after)

    async def delete_subscription(self, name: str) -> None:
        """See Broker."""
        subscription = await self.get_subscription(name)
        await self._queues.delete(subscription)
        await self._state.delete_subscription(name)
        await self._consuming.drop(name)

    async def subscribers(self, topic: str) -> list[Subscription]:
        """See Broker."""
        await self._state.fresh()
        return list((await self._state.route(topic)).subscribers)

    # Publishing.

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """See Broker."""
        check_messages(messages)
        return await self._outgoing.publish(topic, messages)

    async def _tidy(self) -> None:
        """Forget what is too old, for ever."""
        while True:
            try:
                await self._state.tidy()
                await self._snapshots.forget_old()
            except PlexusError as error:
                log.warning("state_not_tidied", reason=error.reason)
            await asyncio.sleep(_TIDY_S)

    # Consuming.

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """See Broker."""
        if not 1 <= max_messages <= MAX_BATCH:
            raise InvalidArgumentError(f"must be 1 to {MAX_BATCH}", field="max_messages")
        self._used(subscription)
        try:
            return await self._consuming.pull(
                subscription, max_messages, max_bytes, min(wait_s, _WAIT_BOUND_S)
            )
        finally:
            self._used(subscription)

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        return await self._consuming.acknowledge(subscription, ack_ids)

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        check_refusals(refusals)
        return await self._consuming.nack(subscription, refusals)

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """See Broker."""
        self._used(subscription)
        if not all(0 <= seconds <= MAX_LEASE_S for _, seconds in leases):
            raise InvalidArgumentError("must be 0 to 1 h", field="deadline")
        return await self._consuming.extend(subscription, leases)

    def hold(self, subscription: str) -> AbstractAsyncContextManager[None]:
        """See Broker."""
        return self._consuming.streams.hold(subscription)

    async def _settle(self, name: str) -> Subscription:
        subscription = await self.get_subscription(name)
        if not subscription.detached:
            await self._consuming.settle(subscription)
        return subscription

    async def stats(self, subscription: str) -> Stats:
        """See Broker; without the oldest message's time, which RabbitMQ does not tell."""
        found = await self._settle(subscription)
        queued, held, unexamined = await self._counted(found)
        delayed = await self._state.deferred(subscription)
        dead = (await self._state.dead_letter_stats(subscription)).total
        set_aside = await self._state.set_aside(subscription) if found.ordered else 0
        return Stats(
            queued + held.ready,
            held.leased,
            delayed + held.waiting,
            dead,
            unexamined=unexamined,
            set_aside=set_aside,
        )

    async def _counted(self, subscription: Subscription) -> tuple[int, Counts, int]:
        """What waits in queues, what windows hold, and how much of the former may not be handed out.

        Windows drop what their filter keeps away, or Seek has passed over; the queues have what no window has
        come to. While what Seek has passed over grows less, this waits for a moment.
        """
        deadline, before = time.monotonic() + _EXAMINE_S, 0
        while True:
            queued = await self._queues.ready(subscription)
            held = await self._consuming.counts(subscription.name)
            total, unexamined = sum(queued.values()), 0
            if subscription.filter:
                unexamined = total
            elif subscription.sought:
                unexamined = sum(count for level, count in queued.items() if level not in held.past_seek)
            stands = unexamined == before or subscription.filter or time.monotonic() > deadline
            if not unexamined or stands:
                return total, held, unexamined
            before = unexamined
            await asyncio.sleep(_LOOK_S)

    async def levels(self, *, limit: int) -> Levels:
        """See Broker; no window is opened for it."""
        found = await self._state.subscriptions("", limit + 1, "")
        waiting = await self._queues.waiting(found[:limit])
        delayed, dead = await self._state.tallies()
        held = self._consuming.held
        return Levels(
            {
                name: held(name, Stats(count, 0, delayed.get(name, 0), dead.get(name, 0)))
                for name, count in waiting.items()
            },
            complete=len(found) <= limit,
            blocked=self._publishing.blocked,
        )

    # Dead letters.

    async def list_dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int = 0
    ) -> list[DeadLetter]:
        """See Broker."""
        await self._settle(subscription)
        return await self._state.dead_letters(subscription, where, limit=limit, after=after)

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """See Broker."""
        await self._settle(subscription)
        return await self._state.dead_letter_stats(subscription)

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """See Broker."""
        self._used(subscription)
        count = await self._state.redrive(subscription, where, how)
        await self._outgoing.move_due()
        return count

    async def purge(self, subscription: str, where: Where) -> int:
        """See Broker."""
        self._used(subscription)
        return await self._state.purge(subscription, where)

    # Logs.

    async def list_events(self, topic: str, events: Events, *, limit: int) -> list[Event]:
        """See Broker."""
        found = await self.get_topic(topic)
        return [event(entry) for entry in await self._logs.read(found, events, limit)]

    async def replay(self, topic: str, events: Events, subscription: str) -> int:
        """See Broker."""
        self._used(subscription)
        found = await self.get_topic(topic)
        target = await self._state.attached(subscription)
        count = 0
        async with aclosing(self._logs.every(found, events)) as parts:
            async for part in parts:
                wanted = [carried for carried in part if target.wants(carried.stored.attributes)]
                await self._outgoing.deliver([(subscription, again(carried)) for carried in wanted])
                count += len(wanted)
        return count

    async def seek(self, subscription: str, position: Position) -> None:
        """See Broker.

        RabbitMQ's queues are not looked into: without a log, it is written down what is over, and that is
        dropped when it is consumed.
        """
        self._used(subscription)
        found = await self._state.attached(subscription)
        if position.snapshot:
            await self._restore(position.snapshot, found)
            return
        by_time = position.time is not None
        topic = None if is_pattern(found.topic) else await self.get_topic(found.topic)
        if topic is not None and topic.log and (not by_time or topic.retains_for(found)):
            await self._logs.check(topic)
            await self._empty(found)
            wanted = Events(after=position.time or 0.0, from_sequence=position.sequence or 0)
            await self.replay(topic.name, wanted, subscription)
        elif position.time is None:
            raise FailedPreconditionError(f"topic {found.topic!r} keeps no log", reason="TOPIC_HAS_NO_LOG")
        elif found.retain_acked:
            await retained.check(found, self._receiving)
            await self._empty(found)
            await retained.restore(found, position.time, self._receiving, self._publisher, self._outgoing)
        elif position.time < time.time():
            await self._consuming.pass_over(await self._state.pass_over(subscription, position.time))
        else:
            await self._empty(found)

    # Snapshots.

    async def create_snapshot(self, name: str, subscription: str, labels: dict[str, str]) -> Snapshot:
        """See Broker; on RabbitMQ leases of an ordered subscription end."""
        self._used(subscription)
        found = await self._attached(subscription)
        if found.ordered:
            # Its queue has one consumer at a time.
            await self._consuming.drop(subscription)

        def held() -> list[Carried]:
            return self._consuming.messages(subscription)

        return await self._snapshots.create(name, found, labels, held)

    async def get_snapshot(self, name: str) -> Snapshot:
        """See Broker."""
        return (await self._state.snapshot(name)).snapshot

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """See Broker."""
        return await self._state.update_snapshot(snapshot)

    async def list_snapshots(self, *, topic: str = "", limit: int, after: str = "") -> list[Snapshot]:
        """See Broker."""
        return await self._state.snapshots(topic, limit, after)

    async def delete_snapshot(self, name: str) -> None:
        """See Broker."""
        await self._snapshots.delete(name)

    async def _restore(self, name: str, subscription: Subscription) -> None:
        kept = await self._state.snapshot(name)
        kept.snapshot.check_seek(subscription)
        await self._snapshots.check(kept)
        await self._empty(subscription)
        await self._snapshots.restore(kept, subscription)

    async def _empty(self, subscription: Subscription) -> None:
        """Be done with all that a subscription holds."""
        await self._queues.purge(subscription)
        await self._consuming.clear(subscription.name)
        await self._state.drop_deferred(subscription.name)

    async def _attached(self, name: str) -> Subscription:
        await self._state.fresh()
        return await self._state.attached(name)
