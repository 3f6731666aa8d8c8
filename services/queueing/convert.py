"""Between queueing messages and the domain."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from plexus.queueing.v1 import queueing_pb2
from services.queueing.domain import Delivery, Message, Refusal, Stats
from services.queueing.kept import DeadLetter, DeadLetterStats, Event, Events, Position, Where
from services.queueing.replies import Kind
from services.queueing.resources import Backoff, Priority, RetryPolicy, Snapshot, Subscription, Topic
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message as Proto

    from services.queueing.replies import Reply

_BACKOFFS = {
    queueing_pb2.BACKOFF_UNSPECIFIED: Backoff.EXPONENTIAL,
    queueing_pb2.BACKOFF_IMMEDIATE: Backoff.IMMEDIATE,
    queueing_pb2.BACKOFF_FIXED: Backoff.FIXED,
    queueing_pb2.BACKOFF_LINEAR: Backoff.LINEAR,
    queueing_pb2.BACKOFF_EXPONENTIAL: Backoff.EXPONENTIAL,
}
_BACKOFFS_TO = {backoff: number for number, backoff in _BACKOFFS.items()}


def seconds(duration: duration_pb2.Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def duration_to(value: float) -> duration_pb2.Duration:
    """A duration of so many seconds."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


def timestamp_to(value: float) -> timestamp_pb2.Timestamp:
    """A time in seconds since 1970."""
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(value * 1e6))
    return timestamp


def _seconds_at(timestamp: timestamp_pb2.Timestamp) -> float:
    return timestamp.seconds + timestamp.nanos / 1e9


def present_to(value: float) -> timestamp_pb2.Timestamp | None:
    """A time in seconds since 1970; absent for 0."""
    return timestamp_to(value) if value else None


_PRIORITIES = {
    queueing_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    queueing_pb2.PRIORITY_LOW: Priority.LOW,
    queueing_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    queueing_pb2.PRIORITY_HIGH: Priority.HIGH,
    queueing_pb2.PRIORITY_CRITICAL: Priority.CRITICAL,
}
_PRIORITIES_TO = {priority: number for number, priority in _PRIORITIES.items()}
TOPIC_MUTABLE = ("log", "retention", "retention_bytes", "labels")
SUBSCRIPTION_MUTABLE = (
    "ack_deadline",
    "retry",
    "dead_letter_topic",
    "ttl",
    "exactly_once",
    "retain_acked",
    "expire_after",
    "labels",
)
SNAPSHOT_MUTABLE = ("expire_time", "labels")


def merge(present: Proto, wanted: Proto, mask: field_mask_pb2.FieldMask, mutable: Sequence[str]) -> None:
    """Take over into `present` what the mask names, or without one what is set (google.aip.dev/134).

    Raises:
        InvalidArgumentError: The mask names what cannot be changed, or is not there.
    """
    kind = cast("Descriptor", present.DESCRIPTOR)
    for path in mask.paths:
        if path.split(".")[0] not in mutable:
            raise InvalidArgumentError(f"{path!r} is not one of {', '.join(mutable)}", field="update_mask")
        if not field_mask_pb2.FieldMask(paths=[path]).IsValidForDescriptor(kind):
            raise InvalidArgumentError(f"{path!r} is no field", field="update_mask")
    if not mask.paths:
        mask.paths.extend(field.name for field, _ in wanted.ListFields() if field.name in mutable)
    mask.MergeMessage(wanted, present, True, True)  # noqa: FBT003 - replaces messages and repeated fields


def topic_from(message: queueing_pb2.Topic) -> Topic:
    """The domain's topic, with its defaults for what is absent."""
    default = Topic("default")
    return Topic(
        name=message.name,
        log=message.log,
        retention_s=seconds(message.retention) if message.HasField("retention") else default.retention_s,
        retention_bytes=message.retention_bytes,
        labels=dict(message.labels),
    )


def topic_to(topic: Topic) -> queueing_pb2.Topic:
    """The proto's topic."""
    return queueing_pb2.Topic(
        name=topic.name,
        create_time=timestamp_to(topic.created),
        log=topic.log,
        retention=duration_to(topic.retention_s),
        retention_bytes=topic.retention_bytes,
        labels=topic.labels,
    )


def retry_from(retry: queueing_pb2.RetryPolicy, owner: str = "subscription") -> RetryPolicy:
    """The domain's policy, with its defaults for what is absent; an error names the field of its owner."""
    try:
        return _policy(retry.SerializeToString())
    except InvalidArgumentError as error:
        violations = [replace(v, field=v.field.replace("subscription", owner)) for v in error.violations]
        raise InvalidArgumentError(error.message, violations=violations) from error


@lru_cache(maxsize=1024)
def _policy(encoded: bytes) -> RetryPolicy:
    """The policy of many messages, which is read once."""
    retry, default = queueing_pb2.RetryPolicy.FromString(encoded), RetryPolicy()
    return RetryPolicy(
        backoff=_BACKOFFS.get(retry.backoff, Backoff.EXPONENTIAL),
        minimum_s=seconds(retry.minimum) if retry.HasField("minimum") else default.minimum_s,
        maximum_s=seconds(retry.maximum) if retry.HasField("maximum") else default.maximum_s,
        max_attempts=retry.max_attempts or default.max_attempts,
    )


def retry_to(retry: RetryPolicy) -> queueing_pb2.RetryPolicy:
    """The proto's policy."""
    return queueing_pb2.RetryPolicy(
        backoff=_BACKOFFS_TO[retry.backoff],
        minimum=duration_to(retry.minimum_s),
        maximum=duration_to(retry.maximum_s),
        max_attempts=retry.max_attempts,
    )


def subscription_from(message: queueing_pb2.Subscription) -> Subscription:
    """The domain's subscription, with its defaults for what is absent."""
    return Subscription(
        name=message.name,
        topic=message.topic,
        ack_deadline_s=seconds(message.ack_deadline) if message.HasField("ack_deadline") else 30.0,
        retry=retry_from(message.retry),
        filter=message.filter,
        ordered=message.ordered,
        dead_letter_topic=message.dead_letter_topic,
        ttl_s=seconds(message.ttl),
        exclusive=message.exclusive,
        exactly_once=message.exactly_once,
        retain_acked=message.retain_acked,
        expire_after_s=seconds(message.expire_after),
        labels=dict(message.labels),
        detached=message.detached,
    )


def subscription_to(subscription: Subscription) -> queueing_pb2.Subscription:
    """The proto's subscription."""
    return queueing_pb2.Subscription(
        name=subscription.name,
        topic=subscription.topic,
        ack_deadline=duration_to(subscription.ack_deadline_s),
        retry=retry_to(subscription.retry),
        create_time=timestamp_to(subscription.created),
        filter=subscription.filter,
        ordered=subscription.ordered,
        dead_letter_topic=subscription.dead_letter_topic,
        ttl=duration_to(subscription.ttl_s) if subscription.ttl_s else None,
        exclusive=subscription.exclusive,
        exactly_once=subscription.exactly_once,
        retain_acked=subscription.retain_acked,
        expire_after=duration_to(subscription.expire_after_s) if subscription.expire_after_s else None,
        labels=subscription.labels,
        detached=subscription.detached,
    )


def message_from(message: queueing_pb2.Message, trace: dict[str, str], field: str) -> Message:
    """The domain's message.

    Args:
        message: The proto's.
        trace: The context of the call, used unless the message brings its own.
        field: Where in the request it is, for errors.
    """
    return Message(
        data=message.data,
        attributes={**trace, **message.attributes},
        dedup_id=message.dedup_id,
        delay_s=seconds(message.delay) if message.HasField("delay") else 0.0,
        ordering_key=message.ordering_key,
        priority=_PRIORITIES.get(message.priority, Priority.NORMAL),
        ttl_s=seconds(message.ttl) if message.HasField("ttl") else 0.0,
        correlation_id=message.correlation_id,
        retry=retry_from(message.retry, field) if message.HasField("retry") else None,
    )


def request_from(request: queueing_pb2.CallRequest, trace: dict[str, str]) -> Message:
    """The message of a call, without what makes it one."""
    return Message(
        data=request.data,
        attributes={**trace, **request.attributes},
        ordering_key=request.ordering_key,
        priority=_PRIORITIES.get(request.priority, Priority.NORMAL),
        correlation_id=request.correlation_id,
    )


def reply_to(reply: Reply) -> queueing_pb2.CallResponse:
    """The proto's progress or result."""
    if reply.kind is Kind.PROGRESS:
        return queueing_pb2.CallResponse(progress=queueing_pb2.CallProgress(data=reply.data))
    return queueing_pb2.CallResponse(result=queueing_pb2.CallResult(data=reply.data))


def message_to(message: Message) -> queueing_pb2.Message:
    """The proto's message."""
    return queueing_pb2.Message(
        data=message.data,
        attributes=message.attributes,
        dedup_id=message.dedup_id,
        delay=duration_to(message.delay_s) if message.delay_s else None,
        ordering_key=message.ordering_key,
        priority=_PRIORITIES_TO[message.priority],
        ttl=duration_to(message.ttl_s) if message.ttl_s else None,
        correlation_id=message.correlation_id,
        retry=retry_to(message.retry) if message.retry else None,
    )


def delivery_to(delivery: Delivery) -> queueing_pb2.Delivery:
    """The proto's delivery."""
    message = delivery.message
    return queueing_pb2.Delivery(
        ack_id=delivery.ack_id,
        message_id=message.message_id,
        data=message.data,
        attributes=message.attributes,
        publish_time=timestamp_to(message.published),
        attempt=delivery.attempt,
        topic=message.topic,
        ordering_key=message.ordering_key,
        priority=_PRIORITIES_TO[message.priority],
        correlation_id=message.correlation_id,
    )


def refusals_from(messages: Iterable[queueing_pb2.Refusal]) -> list[Refusal]:
    """The domain's refusals."""
    return [
        Refusal(
            ack_id=message.ack_id,
            reason=message.reason,
            delay_s=seconds(message.delay) if message.HasField("delay") else None,
            dead=message.dead,
        )
        for message in messages
    ]


def extensions_from(messages: Iterable[queueing_pb2.Extension]) -> list[tuple[str, float]]:
    """Pairs of lease and seconds from now."""
    return [(message.ack_id, seconds(message.deadline)) for message in messages]


def where_from(ids: Iterable[str], message: queueing_pb2.DeadLetterFilter) -> Where:
    """The domain's choice of dead letters."""
    return Where(
        ids=tuple(ids),
        reason=message.reason,
        topic=message.topic,
        after=_seconds_at(message.after),
        before=_seconds_at(message.before),
    )


def dead_letter_to(letter: DeadLetter) -> queueing_pb2.DeadLetter:
    """The proto's dead letter."""
    message = letter.message
    return queueing_pb2.DeadLetter(
        id=letter.id,
        message_id=message.message_id,
        topic=message.topic,
        data=message.data,
        attributes=message.attributes,
        publish_time=timestamp_to(message.published),
        dead_time=timestamp_to(letter.died),
        reason=letter.reason,
        history=[
            queueing_pb2.Attempt(time=timestamp_to(when), reason=reason) for when, reason in letter.history
        ],
        attempts=letter.attempts,
        ordering_key=message.ordering_key,
        priority=_PRIORITIES_TO[message.priority],
        correlation_id=message.correlation_id,
    )


def dead_letter_stats_to(stats: DeadLetterStats) -> queueing_pb2.DeadLetterStats:
    """The proto's counts."""
    return queueing_pb2.DeadLetterStats(
        total=stats.total,
        reasons=stats.reasons,
        oldest_time=present_to(stats.oldest),
        newest_time=present_to(stats.newest),
    )


def stats_to(stats: Stats) -> queueing_pb2.Stats:
    """The proto's counts."""
    return queueing_pb2.Stats(
        ready=stats.ready,
        leased=stats.leased,
        delayed=stats.delayed,
        dead=stats.dead,
        oldest_time=present_to(stats.oldest),
        unexamined=stats.unexamined,
        set_aside=stats.set_aside,
    )


def events_from(message: queueing_pb2.EventFilter) -> Events:
    """The domain's choice of events."""
    return Events(
        kind=message.type,
        correlation_id=message.correlation_id,
        ordering_key=message.ordering_key,
        after=_seconds_at(message.after),
        before=_seconds_at(message.before),
        from_sequence=message.from_sequence,
    )


def event_to(event: Event) -> queueing_pb2.Event:
    """The proto's event."""
    message = event.message
    return queueing_pb2.Event(
        sequence=event.sequence,
        message_id=message.message_id,
        topic=message.topic,
        data=message.data,
        attributes=message.attributes,
        publish_time=timestamp_to(message.published),
        ordering_key=message.ordering_key,
        priority=_PRIORITIES_TO[message.priority],
        correlation_id=message.correlation_id,
    )


def position_from(request: queueing_pb2.SeekRequest) -> Position:
    """The domain's position."""
    if request.HasField("sequence"):
        return Position(sequence=request.sequence)
    if request.HasField("snapshot"):
        return Position(snapshot=request.snapshot)
    return Position(time=_seconds_at(request.time) if request.HasField("time") else None)


def snapshot_from(message: queueing_pb2.Snapshot) -> Snapshot:
    """The domain's snapshot."""
    return Snapshot(
        name=message.name,
        topic=message.topic,
        filter=message.filter,
        expires=_seconds_at(message.expire_time),
        labels=dict(message.labels),
        created=_seconds_at(message.create_time),
    )


def snapshot_to(snapshot: Snapshot) -> queueing_pb2.Snapshot:
    """The proto's snapshot."""
    return queueing_pb2.Snapshot(
        name=snapshot.name,
        topic=snapshot.topic,
        filter=snapshot.filter,
        expire_time=timestamp_to(snapshot.expires),
        labels=snapshot.labels,
        create_time=timestamp_to(snapshot.created),
    )
