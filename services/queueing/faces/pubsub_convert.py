"""Between google.pubsub.v1 and the domain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf import timestamp_pb2
from google.pubsub_v1.types import pubsub as pubsub_types

from services.queueing.convert import seconds
from services.queueing.domain import Delivery, Message
from services.queueing.faces.pubsub_names import DELETED, own, theirs
from services.queueing.resources import DAY_S, Backoff, RetryPolicy, Subscription, Topic
from services.runtime.errors import InvalidArgumentError, UnimplementedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from services.queueing.resources import Snapshot

MIN_DEADLINE_S, MAX_DEADLINE_S = 10, 600
MAX_RESPONSE_BYTES = 3 * 1024 * 1024
"""Of several messages together; one is sent whatever its size. Google's client for Python takes 4 MiB at most
from an emulator, gRPC's default."""
_DEFAULT_RETENTION_S = 7 * DAY_S
_UNLIMITED = 1000
"""Attempts of a subscription without a dead letter policy: the most that the domain has."""
_MIN_ATTEMPTS, _MAX_ATTEMPTS = 5, 100
_TOPIC_UNSUPPORTED = (
    "schema_settings",
    "kms_key_name",
    "ingestion_data_source_settings",
    "message_transforms",
    "message_storage_policy",
    "tags",
)
_SUBSCRIPTION_UNSUPPORTED = (
    "bigquery_config",
    "cloud_storage_config",
    "bigtable_config",
    "message_transforms",
    "tags",
)
_PUSH = ("push_endpoint", "attributes", "oidc_token", "pubsub_wrapper", "no_wrapper")
_ABOUT = {
    "push_endpoint": "only pull delivery is supported",
    "schema_settings": "there are no schemas",
}

# The messages themselves, without the wrapper that the client library puts around them.
TopicProto: Any = pubsub_types.Topic.pb()
SubscriptionProto: Any = pubsub_types.Subscription.pb()
SnapshotProto: Any = pubsub_types.Snapshot.pb()
ReceivedProto: Any = pubsub_types.ReceivedMessage.pb()


def _refuse(message: Any, fields: Iterable[str]) -> None:
    set_fields = {field.name for field, _ in message.ListFields()}
    for name in fields:
        if name in set_fields:
            about = f": {_ABOUT[name]}" if name in _ABOUT else ""
            raise UnimplementedError(
                f"{name} is not supported{about}",
                reason="PUBSUB_FIELD_UNSUPPORTED",
                metadata={"field": name},
            )


def refuse_push(config: Any) -> None:
    """Take a configuration that says nothing, which is pull delivery.

    Raises:
        UnimplementedError: It asks for push delivery.
    """
    _refuse(config, _PUSH)


def topic_from(message: Any) -> Topic:
    """The domain's topic; retention makes it keep a log."""
    _refuse(message, _TOPIC_UNSUPPORTED)
    kept = message.HasField("message_retention_duration")
    return Topic(
        name=own(message.name, "topics", "name"),
        log=kept,
        retention_s=seconds(message.message_retention_duration) if kept else _DEFAULT_RETENTION_S,
        labels=dict(message.labels),
    )


def topic_to(topic: Topic) -> Any:
    """Their topic."""
    message = TopicProto(name=theirs(topic.name, "topics"), labels=topic.labels, state="ACTIVE")
    if topic.log:
        message.message_retention_duration.FromNanoseconds(round(topic.retention_s * 1e9))
    return message


def _retry_from(message: Any) -> RetryPolicy:
    attempts = _UNLIMITED
    if message.HasField("dead_letter_policy"):
        attempts = message.dead_letter_policy.max_delivery_attempts or _MIN_ATTEMPTS
        if not _MIN_ATTEMPTS <= attempts <= _MAX_ATTEMPTS:
            raise InvalidArgumentError("must be 5 to 100", field="dead_letter_policy.max_delivery_attempts")
    if not message.HasField("retry_policy"):
        return RetryPolicy(Backoff.IMMEDIATE, 0.0, 0.0, attempts)
    policy = message.retry_policy
    minimum = seconds(policy.minimum_backoff) if policy.HasField("minimum_backoff") else 10.0
    maximum = seconds(policy.maximum_backoff) if policy.HasField("maximum_backoff") else 600.0
    return RetryPolicy(Backoff.EXPONENTIAL, minimum, maximum, attempts)


def subscription_from(message: Any) -> Subscription:
    """The domain's subscription."""
    _refuse(message, _SUBSCRIPTION_UNSUPPORTED)
    refuse_push(message.push_config)
    expires = message.expiration_policy.HasField("ttl")
    expire_after_s = seconds(message.expiration_policy.ttl) if expires else 0.0
    if expires and expire_after_s < DAY_S:
        raise InvalidArgumentError("must be at least a day", field="expiration_policy.ttl")
    deadline = message.ack_deadline_seconds or MIN_DEADLINE_S
    if not MIN_DEADLINE_S <= deadline <= MAX_DEADLINE_S:
        raise InvalidArgumentError("must be 10 to 600", field="ack_deadline_seconds")
    dead = message.dead_letter_policy.dead_letter_topic
    retained = message.HasField("message_retention_duration")
    return Subscription(
        name=own(message.name, "subscriptions", "name"),
        topic=own(message.topic, "topics", "topic"),
        ack_deadline_s=float(deadline),
        retry=_retry_from(message),
        filter=message.filter,
        ordered=message.enable_message_ordering,
        exactly_once=message.enable_exactly_once_delivery,
        dead_letter_topic=own(dead, "topics", "dead_letter_policy.dead_letter_topic") if dead else "",
        ttl_s=seconds(message.message_retention_duration) if retained else _DEFAULT_RETENTION_S,
        retain_acked=message.retain_acked_messages,
        expire_after_s=expire_after_s,
        labels=dict(message.labels),
    )


def subscription_to(subscription: Subscription, topic: Topic | None) -> Any:
    """Their subscription, whose topic may be gone."""
    message = SubscriptionProto(
        name=theirs(subscription.name, "subscriptions"),
        topic=theirs(subscription.topic, "topics") if topic else DELETED,
        ack_deadline_seconds=round(subscription.ack_deadline_s),
        labels=subscription.labels,
        enable_message_ordering=subscription.ordered,
        enable_exactly_once_delivery=subscription.exactly_once,
        filter=subscription.filter,
        retain_acked_messages=subscription.retain_acked,
        detached=subscription.detached,
        state="ACTIVE",
    )
    message.push_config.SetInParent()
    message.expiration_policy.SetInParent()
    if subscription.expire_after_s:
        message.expiration_policy.ttl.FromNanoseconds(round(subscription.expire_after_s * 1e9))
    if topic is not None and topic.log:
        message.topic_message_retention_duration.FromNanoseconds(round(topic.retention_s * 1e9))
    if subscription.ttl_s:
        message.message_retention_duration.FromNanoseconds(round(subscription.ttl_s * 1e9))
    retry = subscription.retry
    if retry.backoff is not Backoff.IMMEDIATE:
        message.retry_policy.minimum_backoff.FromNanoseconds(round(retry.minimum_s * 1e9))
        message.retry_policy.maximum_backoff.FromNanoseconds(round(retry.maximum_s * 1e9))
    if subscription.dead_letter_topic:
        message.dead_letter_policy.dead_letter_topic = theirs(subscription.dead_letter_topic, "topics")
        message.dead_letter_policy.max_delivery_attempts = retry.max_attempts
    return message


def snapshot_to(snapshot: Snapshot, *, topic_exists: bool) -> Any:
    """Their snapshot, whose topic may be gone."""
    message = SnapshotProto(
        name=theirs(snapshot.name, "snapshots"),
        topic=theirs(snapshot.topic, "topics") if topic_exists else DELETED,
        labels=snapshot.labels,
    )
    message.expire_time.FromMicroseconds(round(snapshot.expires * 1e6))
    return message


def snapshot_from(message: Any, present: Snapshot) -> Snapshot:
    """The domain's snapshot, with what cannot change as it was."""
    return replace(present, labels=dict(message.labels), expires=message.expire_time.ToMicroseconds() / 1e6)


def message_from(message: Any, position: int) -> Message:
    """The domain's message."""
    if not message.data and not message.attributes:
        raise InvalidArgumentError("needs data or attributes", field=f"messages[{position}]")
    return Message(message.data, dict(message.attributes), ordering_key=message.ordering_key)


def received(delivery: Delivery, *, with_attempt: bool) -> Any:
    """Their received message; attempts are told only with a dead letter policy, as there."""
    stored = delivery.message
    published = timestamp_pb2.Timestamp()
    published.FromMicroseconds(round(stored.published * 1e6))
    message = ReceivedProto(ack_id=delivery.ack_id, delivery_attempt=delivery.attempt if with_attempt else 0)
    message.message.data = stored.data
    message.message.attributes.update(stored.attributes)
    message.message.message_id = stored.message_id
    message.message.publish_time.CopyFrom(published)
    message.message.ordering_key = stored.ordering_key
    return message


def ack_deadline(seconds: int) -> int:
    """A deadline that may be set.

    Raises:
        InvalidArgumentError: It may not.
    """
    if not 0 <= seconds <= MAX_DEADLINE_S:
        raise InvalidArgumentError("must be 0 to 600", field="ack_deadline_seconds")
    return seconds


def parts(messages: Sequence[Any]) -> Iterator[list[Any]]:
    """Received messages in responses that stay below the bound on the wire; attributes count too."""
    part: list[Any] = []
    size = 0
    for message in messages:
        more = message.ByteSize()
        if part and size + more > MAX_RESPONSE_BYTES:
            yield part
            part, size = [], 0
        part.append(message)
        size += more
    yield part
