"""Topics, subscriptions and deliveries, and what any broker does with them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DATA_BYTES = 10 * 1024 * 1024
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_BYTES = 16 * 1024
MAX_DELAY_S = 30 * 24 * 3600.0
MAX_BATCH = 1000
MAX_REASON = 1000
MAX_HISTORY = 20
MAX_LEASE_S = 3600.0
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")


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
        if not 0 <= self.minimum_s <= 3600 or not self.minimum_s <= self.maximum_s <= 86400:  # noqa: PLR2004 - stated in the proto
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
    """Where messages are published; `created` is seconds since 1970."""

    name: str
    created: float


@dataclass(frozen=True, slots=True)
class Subscription:
    """Messages of a topic, shared by its consumers."""

    name: str
    topic: str
    ack_deadline_s: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    created: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name, "subscription.name")
        if not 1 <= self.ack_deadline_s <= MAX_LEASE_S:
            raise InvalidArgumentError("must be 1 s to 1 h", field="subscription.ack_deadline")


@dataclass(frozen=True, slots=True)
class Message:
    """A message to publish."""

    data: bytes
    attributes: dict[str, str] = field(default_factory=dict)
    dedup_id: str = ""
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that a consumer has for now; `attempt` counts from 1, `published` is seconds since 1970."""

    ack_id: str
    message_id: str
    data: bytes
    attributes: dict[str, str]
    published: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message given back: why, when it comes again if not by the policy, or that it is given up."""

    ack_id: str
    reason: str = ""
    delay_s: float | None = None
    dead: bool = False


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up; `history` holds pairs of time and reason, the newest last."""

    id: str
    message_id: str
    topic: str
    data: bytes
    attributes: dict[str, str]
    published: float
    died: float
    reason: str
    history: list[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of a subscription."""

    ready: int
    leased: int
    delayed: int
    dead: int


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


def check_messages(messages: Sequence[Message]) -> None:
    """Apply the bounds of Publish.

    Raises:
        InvalidArgumentError: No, too many, too large or wrongly delayed messages.
    """
    if not 1 <= len(messages) <= MAX_BATCH:
        raise InvalidArgumentError(f"needs 1 to {MAX_BATCH} messages", field="messages")
    for position, message in enumerate(messages):
        at = f"messages[{position}]"
        if len(message.data) > MAX_DATA_BYTES:
            raise InvalidArgumentError(f"at most {MAX_DATA_BYTES} bytes", field=f"{at}.data")
        size = sum(len(key.encode()) + len(value.encode()) for key, value in message.attributes.items())
        if len(message.attributes) > MAX_ATTRIBUTES or size > MAX_ATTRIBUTE_BYTES:
            raise InvalidArgumentError(
                f"at most {MAX_ATTRIBUTES} entries and {MAX_ATTRIBUTE_BYTES} bytes", field=f"{at}.attributes"
            )
        if not 0 <= message.delay_s <= MAX_DELAY_S:
            raise InvalidArgumentError("must be 0 to 30 days", field=f"{at}.delay")
        if len(message.dedup_id) > MAX_REASON:
            raise InvalidArgumentError(f"at most {MAX_REASON} characters", field=f"{at}.dedup_id")


class Broker(Protocol):
    """Carries messages; every change is durable when its call returns.

    Calls on a topic or subscription that does not exist raise NotFoundError.
    """

    async def create_topic(self, name: str) -> Topic:
        """Create a topic.

        Raises:
            AlreadyExistsError: There is one.
        """
        ...

    async def get_topic(self, name: str) -> Topic:
        """Get a topic."""
        ...

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """Topics in order of names."""
        ...

    async def delete_topic(self, name: str) -> None:
        """Delete a topic; its subscriptions stay."""
        ...

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """Create a subscription, or return the present one if its settings are equal.

        Raises:
            AlreadyExistsError: There is one with other settings.
        """
        ...

    async def get_subscription(self, name: str) -> Subscription:
        """Get a subscription."""
        ...

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """Subscriptions in order of names, of one topic if given."""
        ...

    async def delete_subscription(self, name: str) -> None:
        """Delete a subscription with what it holds."""
        ...

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """Publish all or none; returns their ids."""
        ...

    async def pull(
        self, subscription: str, *, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """Lease ready messages, waiting up to `wait_s` seconds for the first.

        At most `max_bytes` of content together, but one message whatever its size.
        """
        ...

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> list[str]:
        """Be done with messages; returns the ids whose lease had ended."""
        ...

    async def nack(self, subscription: str, refusals: Sequence[Refusal]) -> list[str]:
        """Give messages back; returns the ids whose lease had ended."""
        ...

    async def extend(self, subscription: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end, in seconds from now, 0 for at once; returns the ids whose lease had ended.

        Returning a message this way is no failed attempt.
        """
        ...

    async def list_dead_letters(self, subscription: str, *, limit: int, after: int = 0) -> list[DeadLetter]:
        """Dead letters, oldest first, after an id."""
        ...

    async def redrive(self, subscription: str, ids: Sequence[str]) -> int:
        """Deliver dead letters again, all without ids; returns how many."""
        ...

    async def purge(self, subscription: str, ids: Sequence[str]) -> int:
        """Delete dead letters, all without ids; returns how many."""
        ...

    async def stats(self, subscription: str) -> Stats:
        """Count what a subscription holds."""
        ...
