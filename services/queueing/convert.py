"""Between queueing messages and the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import duration_pb2, timestamp_pb2

from plexus.queueing.v1 import queueing_pb2
from services.queueing.domain import (
    Backoff,
    DeadLetter,
    Delivery,
    Message,
    Refusal,
    RetryPolicy,
    Stats,
    Subscription,
    Topic,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

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


def _duration(value: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


def _timestamp(value: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(value * 1e6))
    return timestamp


def topic_to(topic: Topic) -> queueing_pb2.Topic:
    """The proto's topic."""
    return queueing_pb2.Topic(name=topic.name, create_time=_timestamp(topic.created))


def subscription_from(message: queueing_pb2.Subscription) -> Subscription:
    """The domain's subscription, with its defaults for what is absent."""
    default = RetryPolicy()
    retry = message.retry
    return Subscription(
        name=message.name,
        topic=message.topic,
        ack_deadline_s=seconds(message.ack_deadline) if message.HasField("ack_deadline") else 30.0,
        retry=RetryPolicy(
            backoff=_BACKOFFS[retry.backoff],
            minimum_s=seconds(retry.minimum) if retry.HasField("minimum") else default.minimum_s,
            maximum_s=seconds(retry.maximum) if retry.HasField("maximum") else default.maximum_s,
            max_attempts=retry.max_attempts or default.max_attempts,
        ),
    )


def subscription_to(subscription: Subscription) -> queueing_pb2.Subscription:
    """The proto's subscription."""
    retry = subscription.retry
    return queueing_pb2.Subscription(
        name=subscription.name,
        topic=subscription.topic,
        ack_deadline=_duration(subscription.ack_deadline_s),
        retry=queueing_pb2.RetryPolicy(
            backoff=_BACKOFFS_TO[retry.backoff],
            minimum=_duration(retry.minimum_s),
            maximum=_duration(retry.maximum_s),
            max_attempts=retry.max_attempts,
        ),
        create_time=_timestamp(subscription.created),
    )


def message_from(message: queueing_pb2.Message) -> Message:
    """The domain's message."""
    return Message(message.data, dict(message.attributes), message.dedup_id, seconds(message.delay))


def delivery_to(delivery: Delivery) -> queueing_pb2.Delivery:
    """The proto's delivery."""
    return queueing_pb2.Delivery(
        ack_id=delivery.ack_id,
        message_id=delivery.message_id,
        data=delivery.data,
        attributes=delivery.attributes,
        publish_time=_timestamp(delivery.published),
        attempt=delivery.attempt,
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


def dead_letter_to(letter: DeadLetter) -> queueing_pb2.DeadLetter:
    """The proto's dead letter."""
    return queueing_pb2.DeadLetter(
        id=letter.id,
        message_id=letter.message_id,
        topic=letter.topic,
        data=letter.data,
        attributes=letter.attributes,
        publish_time=_timestamp(letter.published),
        dead_time=_timestamp(letter.died),
        reason=letter.reason,
        history=[
            queueing_pb2.Attempt(time=_timestamp(when), reason=reason) for when, reason in letter.history
        ],
    )


def stats_to(stats: Stats) -> queueing_pb2.Stats:
    """The proto's counts."""
    return queueing_pb2.Stats(ready=stats.ready, leased=stats.leased, delayed=stats.delayed, dead=stats.dead)
