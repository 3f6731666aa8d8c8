"""Messages and their deliveries, and what any broker does with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from services.queueing.resources import MAX_TTL_S, Priority
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from services.queueing.kept import (
        DeadLetter,
        DeadLetterStats,
        Event,
        Events,
        Position,
        Redrive,
        Where,
    )
    from services.queueing.resources import RetryPolicy, Snapshot, Subscription, Topic

MAX_DATA_BYTES = 10 * 1024 * 1024
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_BYTES = 16 * 1024
MAX_DELAY_S = 30 * 24 * 3600.0
MAX_BATCH = 1000
MAX_REASON = 1000
MAX_HISTORY = 20
MAX_ID = 1000
_TRACE = "traceparent"


@dataclass(frozen=True, slots=True)
class Message:
    """A message to publish.

    Attributes:
        data: Content.
        attributes: Headers.
        dedup_id: Of the same message within the window; empty is none.
        delay_s: Not delivered before this much has passed.
        ordering_key: Messages with the same one come in order, on subscriptions that are ordered.
        priority: What comes first, on subscriptions that are not ordered.
        ttl_s: Given up when it has waited this long; 0 leaves it to the subscription.
        correlation_id: Of the work that it belongs to.
        retry: Instead of the subscription's policy.
    """

    data: bytes
    attributes: dict[str, str] = field(default_factory=dict)
    dedup_id: str = ""
    delay_s: float = 0.0
    ordering_key: str = ""
    priority: Priority = Priority.NORMAL
    ttl_s: float = 0.0
    correlation_id: str = ""
    retry: RetryPolicy | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What a broker keeps of a message, and every delivery of it shows; `published` is seconds since 1970."""

    message_id: str
    topic: str
    data: bytes
    attributes: dict[str, str]
    published: float
    ordering_key: str = ""
    priority: Priority = Priority.NORMAL
    correlation_id: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that a consumer has for now; `attempt` counts from 1."""

    ack_id: str
    message: Stored
    attempt: int

    @property
    def data(self) -> bytes:
        """Content."""
        return self.message.data


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message given back: why, when it comes again if not by the policy, or that it is given up."""

    ack_id: str
    reason: str = ""
    delay_s: float | None = None
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of a subscription.

    Attributes:
        ready: May be handed out; at most, while some are unexamined.
        leased: With a consumer.
        delayed: Wait for their time.
        dead: Given up.
        oldest: When the oldest of its messages was published, seconds since 1970; 0 without any.
        unexamined: How many of the ready ones were not compared yet with the subscription's filter, or with
            the time that Seek set it to.
        set_aside: How many of those that are ready, leased or delayed a broker has moved out of the way of
            others, since their ordering keys stand still.
    """

    ready: int
    leased: int
    delayed: int
    dead: int
    oldest: float = 0.0
    unexamined: int = 0
    set_aside: int = 0


@dataclass(frozen=True, slots=True)
class Levels:
    """What subscriptions hold, as far as it is known without disturbing anybody.

    Attributes:
        subscriptions: By name. Of replicas that share messages each tells `leased` and `oldest` of its own.
        complete: These are all subscriptions.
        blocked: Why the broker takes no messages now, in its words; empty while it does.
    """

    subscriptions: dict[str, Stats]
    complete: bool = True
    blocked: str = ""


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
        if message.attributes:
            _check_attributes(message.attributes, f"{at}.attributes")
        if not 0 <= message.delay_s <= MAX_DELAY_S:
            raise InvalidArgumentError("must be 0 to 30 days", field=f"{at}.delay")
        if not 0 <= message.ttl_s <= MAX_TTL_S:
            raise InvalidArgumentError("must be 0 to 31 days", field=f"{at}.ttl")
        for name in ("dedup_id", "ordering_key", "correlation_id"):
            if len(getattr(message, name)) > MAX_ID:
                raise InvalidArgumentError(f"at most {MAX_ID} characters", field=f"{at}.{name}")


def _check_attributes(attributes: dict[str, str], field_name: str) -> None:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in attributes.items())
    if len(attributes) > MAX_ATTRIBUTES or size > MAX_ATTRIBUTE_BYTES:
        if _TRACE in attributes:
            # The service adds it itself: who keeps to the bounds is not refused for that.
            own = {key: value for key, value in attributes.items() if key != _TRACE}
            _check_attributes(own, field_name)
            return
        raise InvalidArgumentError(
            f"at most {MAX_ATTRIBUTES} entries and {MAX_ATTRIBUTE_BYTES} bytes", field=field_name
        )
    if "" in attributes:
        raise InvalidArgumentError("a key must not be empty", field=field_name)


def check_refusals(refusals: Sequence[Refusal]) -> None:
    """Apply the bounds of Nack.

    Raises:
        InvalidArgumentError: A delay is out of bounds.
    """
    for position, refusal in enumerate(refusals):
        if refusal.delay_s is not None and not 0 <= refusal.delay_s <= MAX_DELAY_S:
            raise InvalidArgumentError("must be 0 to 30 days", field=f"refusals[{position}].delay")


class Broker(Protocol):
    """Carries messages; every change is durable when its call returns.

    Calls on a topic or subscription that does not exist raise NotFoundError.
    """

    async def create_topic(self, topic: Topic) -> Topic:
        """Create a topic.

        Raises:
            AlreadyExistsError: There is one.
        """
        ...

    async def get_topic(self, name: str) -> Topic:
        """Get a topic."""
        ...

    async def update_topic(self, topic: Topic) -> Topic:
        """Change the settings of a topic."""
        ...

    async def list_topics(self, *, limit: int, after: str = "") -> list[Topic]:
        """Topics in order of names."""
        ...

    async def delete_topic(self, name: str) -> None:
        """Delete a topic with its log; its subscriptions stay."""
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

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """Change the settings of a subscription that may change, `detached` among them.

        Raises:
            InvalidArgumentError: A fixed setting would change.
        """
        ...

    async def list_subscriptions(self, *, topic: str = "", limit: int, after: str = "") -> list[Subscription]:
        """Subscriptions in order of names, of one topic or pattern if given."""
        ...

    async def delete_subscription(self, name: str) -> None:
        """Delete a subscription with what it holds."""
        ...

    async def subscribers(self, topic: str) -> list[Subscription]:
        """Subscriptions that follow a topic, whatever their filters."""
        ...

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        """Publish messages; returns their ids.

        All are checked before any is stored. A failure to store them leaves none, if the broker has
        transactions; else any of them may be there, and with deduplication ids a repetition stores each once.
        """
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

    async def list_dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int = 0
    ) -> list[DeadLetter]:
        """Dead letters, oldest first, after an id."""
        ...

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """Count dead letters."""
        ...

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """Deliver dead letters again; returns how many."""
        ...

    async def purge(self, subscription: str, where: Where) -> int:
        """Delete dead letters; returns how many."""
        ...

    def hold(self, subscription: str) -> AbstractAsyncContextManager[None]:
        """Have an exclusive subscription for one stream, during the block.

        Raises:
            FailedPreconditionError: Another stream has it.
            UnavailableError: In the block: it could not be kept for it alone any longer.
        """
        ...

    async def stats(self, subscription: str) -> Stats:
        """Count what a subscription holds."""
        ...

    async def levels(self, *, limit: int) -> Levels:
        """Count what the first subscriptions hold, in order of names; nothing else is done by it."""
        ...

    async def list_events(self, topic: str, events: Events, *, limit: int) -> list[Event]:
        """Events of a topic's log, oldest first.

        Raises:
            FailedPreconditionError: The topic keeps no log.
        """
        ...

    async def replay(self, topic: str, events: Events, subscription: str) -> int:
        """Deliver events again to one subscription; returns how many."""
        ...

    async def seek(self, subscription: str, position: Position) -> None:
        """Be done with what was published before the position; deliver again what a log has from there on.

        Set to a snapshot, it holds what the snapshot keeps and nothing else.
        """
        ...

    async def create_snapshot(self, name: str, subscription: str, labels: dict[str, str]) -> Snapshot:
        """Keep what the subscription holds, and what is published for it from then on.

        Raises:
            AlreadyExistsError: There is one.
            FailedPreconditionError: It would expire within an hour, or the subscription is detached.
        """
        ...

    async def get_snapshot(self, name: str) -> Snapshot:
        """Get a snapshot."""
        ...

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Change the labels or the expiry of a snapshot.

        Raises:
            InvalidArgumentError: It would expire in the past or too late.
        """
        ...

    async def list_snapshots(self, *, topic: str = "", limit: int, after: str = "") -> list[Snapshot]:
        """Snapshots in order of names, of one topic or pattern if given."""
        ...

    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot with what it keeps."""
        ...
