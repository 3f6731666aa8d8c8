"""Topics and subscriptions, and the settings that any broker obeys."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from services.queueing.filters import compiled
from services.queueing.patterns import check_pattern, follows, is_pattern
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LEASE_S = 3600.0
MAX_LABELS = 64
MAX_LABEL = 63
DAY_S = 24 * 3600.0
MAX_TTL_S = 31 * DAY_S
MAX_RETENTION_S = 366 * DAY_S
MAX_SNAPSHOT_S = 7 * DAY_S
MIN_SNAPSHOT_S = 3600.0
MAX_SOUGHT = 16
"""Times that are remembered of one subscription, each before the last; forgetting one delivers too much."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")


def check_name(name: str, field_name: str) -> str:
    """Return a valid name.

    Raises:
        InvalidArgumentError: It is not one.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            "must be 1 to 128 letters, digits, dots, hyphens and underscores, beginning with a letter",
            field=field_name,
        )
    return name


def check_labels(labels: Mapping[str, str], field_name: str) -> None:
    """Apply the bounds of labels.

    Raises:
        InvalidArgumentError: Too many, too long, or one without a name.
    """
    if len(labels) > MAX_LABELS or any(max(len(k), len(v)) > MAX_LABEL or not k for k, v in labels.items()):
        raise InvalidArgumentError(
            f"at most {MAX_LABELS} labels of at most {MAX_LABEL} characters", field=field_name
        )


class Priority(IntEnum):
    """What comes first; equal ones come in order of publishing."""

    LOW = 0
    NORMAL = 1
    HIGH = 2
    CRITICAL = 3


class Backoff(StrEnum):
    """How the pause between attempts grows."""

    IMMEDIATE = "immediate"
    FIXED = "fixed"
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a message that was not acknowledged comes again; pauses in seconds."""

    backoff: Backoff = Backoff.EXPONENTIAL
    minimum_s: float = 1.0
    maximum_s: float = 600.0
    max_attempts: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.minimum_s <= 3600 or not self.minimum_s <= self.maximum_s <= DAY_S:  # noqa: PLR2004 - stated in the proto
            raise InvalidArgumentError(
                "minimum is 0 to 1 h, maximum from minimum to 24 h", field="subscription.retry"
            )
        if not 1 <= self.max_attempts <= 1000:  # noqa: PLR2004 - stated in the proto
            raise InvalidArgumentError("must be 1 to 1000", field="subscription.retry.max_attempts")

    def pause_s(self, attempt: int) -> float:
        """The pause after a failed attempt, counted from 1; exponential ones have up to a tenth of jitter."""
        if self.backoff is Backoff.IMMEDIATE:
            return 0.0
        if self.backoff is Backoff.FIXED:
            return self.minimum_s
        if self.backoff is Backoff.LINEAR:
            return min(self.maximum_s, self.minimum_s * attempt)
        pause = min(self.maximum_s, self.minimum_s * 2.0 ** min(attempt - 1, 60))
        return pause * random.uniform(0.9, 1.0)  # noqa: S311 - spreads load only


@dataclass(frozen=True, slots=True)
class Topic:
    """Where messages are published.

    Attributes:
        name: Of the topic.
        log: Whether what is published is also kept, in order, to be read again.
        retention_s: How long a log keeps an event.
        retention_bytes: How much content a log keeps; 0 is no bound.
        labels: For its owner's bookkeeping.
        created: Seconds since 1970.
    """

    name: str
    log: bool = False
    retention_s: float = 7 * DAY_S
    retention_bytes: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name, "topic")
        if not 1 <= self.retention_s <= MAX_RETENTION_S:
            raise InvalidArgumentError("must be 1 s to 366 days", field="topic.retention")
        if self.retention_bytes < 0:
            raise InvalidArgumentError("must not be negative", field="topic.retention_bytes")
        check_labels(self.labels, "topic.labels")

    def retains_for(self, subscription: Subscription) -> bool:
        """Whether its log, rather than what a subscription retains itself, tells what that one had."""
        return self.log and not (subscription.retain_acked and subscription.ttl_s > self.retention_s)


@dataclass(frozen=True, slots=True)
class Subscription:
    """Messages of a topic, shared by its consumers.

    Attributes:
        name: Of the subscription.
        topic: Name of a topic, or a pattern of names.
        ack_deadline_s: How long a consumer has a message.
        retry: When a failed message comes again.
        filter: Expression that a message's attributes must satisfy; empty is every message.
        ordered: Whether messages with the same ordering key come one after the other.
        dead_letter_topic: Where given-up messages are published; empty keeps them as dead letters here.
        ttl_s: How long a message waits before it is given up; 0 is for ever.
        exclusive: Whether only one consumer at a time may stream.
        exactly_once: Whether a message that was acknowledged never comes again, also when the broker's
            connection is lost right after.
        retain_acked: Whether what it is done with is kept for Seek, until `ttl_s` after it was published.
        expire_after_s: It is deleted when nobody has used it for this long; 0 is never.
        labels: For its owner's bookkeeping.
        detached: Whether it was cut off from its topic: it gets and gives nothing more.
        sought: Pairs of times, seconds since 1970: what was published before the first and held at the second
            is over, since Seek passed over it. Only for brokers that cannot look into their queues.
        created: Seconds since 1970.
    """

    name: str
    topic: str
    ack_deadline_s: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    filter: str = ""
    ordered: bool = False
    dead_letter_topic: str = ""
    ttl_s: float = 0.0
    exclusive: bool = False
    exactly_once: bool = False
    retain_acked: bool = False
    expire_after_s: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    detached: bool = False
    sought: tuple[tuple[float, float], ...] = ()
    created: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name, "subscription.name")
        if is_pattern(self.topic):
            check_pattern(self.topic, "subscription.topic")
        if not 1 <= self.ack_deadline_s <= MAX_LEASE_S:
            raise InvalidArgumentError("must be 1 s to 1 h", field="subscription.ack_deadline")
        if not 0 <= self.ttl_s <= MAX_TTL_S:
            raise InvalidArgumentError("must be 0 to 31 days", field="subscription.ttl")
        if self.expire_after_s and not 1 <= self.expire_after_s <= MAX_RETENTION_S:
            raise InvalidArgumentError("must be 1 s to 366 days", field="subscription.expire_after")
        if self.retain_acked and not self.ttl_s:
            raise InvalidArgumentError("must be set to retain what is acknowledged", field="subscription.ttl")
        check_labels(self.labels, "subscription.labels")
        compiled(self.filter)

    def follows(self, topic: str) -> bool:
        """Whether it gets messages published to this topic."""
        return not self.detached and follows(self.topic, topic)

    def wants(self, attributes: Mapping[str, str]) -> bool:
        """Whether its filter lets a message with these attributes through."""
        return not self.filter or compiled(self.filter)(attributes)

    def settings(self) -> Subscription:
        """Itself without what the service adds."""
        return replace(self, created=0.0, detached=False, sought=())

    def passing_over(self, published_before: float, now: float) -> Subscription:
        """Itself, done with what it holds now and was published before a time."""
        older = tuple(pair for pair in self.sought if pair[0] > published_before)
        return replace(self, sought=(*older, (published_before, now))[-MAX_SOUGHT:])

    def is_past(self, published: float, entered: float) -> bool:
        """Whether Seek has passed over a message that it got at a time."""
        return any(published < before and entered <= at for before, at in self.sought)

    def check_change(self, wanted: Subscription) -> None:
        """Apply the rules of UpdateSubscription.

        Raises:
            InvalidArgumentError: A setting would change that is fixed at creation.
        """
        for name in ("topic", "filter", "ordered", "exclusive"):
            if getattr(self, name) != getattr(wanted, name):
                raise InvalidArgumentError("is fixed at creation", field=f"subscription.{name}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a subscription had not settled at one time, and all that was published since.

    Attributes:
        name: Of the snapshot.
        topic: Of the subscription it was made of: a name, or a pattern of names.
        filter: Of that subscription; other messages are not kept.
        expires: When it is deleted, seconds since 1970.
        labels: For its owner's bookkeeping.
        created: Seconds since 1970.
    """

    name: str
    topic: str
    filter: str = ""
    expires: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name, "snapshot.name")
        check_labels(self.labels, "snapshot.labels")

    def keeps(self, topic: str, attributes: Mapping[str, str]) -> bool:
        """Whether it keeps a message published to this topic."""
        return follows(self.topic, topic) and (not self.filter or compiled(self.filter)(attributes))

    def check_change(self, wanted: Snapshot, now: float) -> None:
        """Apply the rules of UpdateSnapshot.

        Raises:
            InvalidArgumentError: It would expire in the past, or later than any snapshot may.
        """
        if not now < wanted.expires <= self.created + MAX_SNAPSHOT_S:
            raise InvalidArgumentError(
                "must be in the future, and within 7 days of its creation", field="snapshot.expire_time"
            )
        if (wanted.topic, wanted.filter) != (self.topic, self.filter):
            raise InvalidArgumentError("is fixed at creation", field="snapshot.topic")

    def check_seek(self, subscription: Subscription) -> None:
        """Apply the rules of Seek.

        Raises:
            InvalidArgumentError: It is of another topic.
        """
        if self.topic != subscription.topic:
            raise InvalidArgumentError(
                f"is of topic {self.topic!r}, not of the subscription's {subscription.topic!r}",
                field="snapshot",
                reason="SNAPSHOT_OF_OTHER_TOPIC",
            )


def snapshot_of(
    name: str, subscription: Subscription, labels: Mapping[str, str], *, oldest: float, now: float
) -> Snapshot:
    """A snapshot that lives for seven days from when the oldest message that it holds was published.

    Args:
        name: Of the snapshot.
        subscription: What it is made of.
        labels: For its owner's bookkeeping.
        oldest: When that message was published; 0 without any.
        now: Seconds since 1970.

    Raises:
        FailedPreconditionError: It would live for less than an hour.
    """
    expires = (oldest or now) + MAX_SNAPSHOT_S
    if expires - now < MIN_SNAPSHOT_S:
        raise FailedPreconditionError(
            "the subscription holds messages so old that the snapshot would expire within an hour",
            reason="SNAPSHOT_TOO_SHORT",
            metadata={"subscription": subscription.name},
        )
    return Snapshot(name, subscription.topic, subscription.filter, expires, dict(labels), now)
