"""What RabbitMQ cannot hold: the catalogue, dead letters, deduplication, messages whose time is to come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Message
    from services.queueing.kept import DeadLetter, DeadLetterStats, Redrive, Where
    from services.queueing.resources import Snapshot, Subscription, Topic

    Guard = Callable[[AsyncConnection], Awaitable[None]]


REPLICA = "replica/"
"""What the leases begin with that replicas have for as long as they live."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A snapshot and the stream where it keeps messages."""

    snapshot: Snapshot
    stream: str


@dataclass(frozen=True, slots=True)
class Route:
    """A topic, and the subscriptions and snapshots that follow it, whatever their filters."""

    topic: Topic
    subscribers: Sequence[Subscription]
    keepers: Sequence[Kept] = ()


STREAM = "@"
"""Before the name of a stream, where a subscription's would be, which has none such."""


@dataclass(frozen=True, slots=True)
class Deferral:
    """A message that waits for its time, for one subscription or stream; `due` is seconds since 1970."""

    subscription: str
    carried: Carried
    due: float


@dataclass(frozen=True, slots=True)
class Due:
    """A message whose time has come, for one subscription; `head` is as `wire.head` says it."""

    subscription: str
    message_id: str
    head: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Parked:
    """A message of an ordered subscription that waits behind others of its key, outside RabbitMQ.

    Attributes:
        position: Rises along the line.
        carried: The message.
        arrived: Failed attempts that it came with.
    """

    position: int
    carried: Carried
    arrived: int

    def as_arrived(self) -> Carried:
        """What came from RabbitMQ."""
        return replace(self.carried, attempts=self.arrived)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is known of a deduplication id.

    Attributes:
        message_id: Of the message that has it.
        published: That message is with the broker.
        ours: We are to publish it; if neither this nor `published`, somebody else is about to.
        holder: The lease of who has it, if it is a replica's that has one.
    """

    message_id: str
    published: bool = False
    ours: bool = False
    holder: str = ""


class State(Protocol):
    """Every method is durable when it returns, and may be repeated when it raises UnavailableError.

    Calls on a topic or subscription that does not exist raise NotFoundError.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def shared(self) -> bool:
        """Whether other replicas use it too."""
        ...

    # The catalogue; what was asked for once is remembered, see `fresh`.

    async def fresh(self) -> None:
        """Forget what others have changed before this call."""
        ...

    async def route(self, topic: str) -> Route:
        """Where messages of a topic go."""
        ...

    async def topic(self, name: str) -> Topic:
        """Read a topic."""
        ...

    async def topics(self, limit: int, after: str) -> list[Topic]:
        """Read topics in order of names."""
        ...

    async def create_topic(self, topic: Topic) -> Topic:
        """Insert a topic.

        Raises:
            AlreadyExistsError: There is one.
        """
        ...

    async def update_topic(self, topic: Topic) -> Topic:
        """Replace a topic's settings."""
        ...

    async def delete_topic(self, name: str) -> None:
        """Delete a topic."""
        ...

    async def subscription(self, name: str) -> Subscription:
        """Read a subscription."""
        ...

    async def attached(self, name: str) -> Subscription:
        """Read a subscription that may be pulled.

        Raises:
            FailedPreconditionError: It is detached.
        """
        ...

    async def subscriptions(self, topic: str, limit: int, after: str) -> list[Subscription]:
        """Read subscriptions in order of names."""
        ...

    async def create_subscription(self, subscription: Subscription) -> Subscription:
        """Insert a subscription, or give the present one if it is the same.

        Raises:
            AlreadyExistsError: There is one with other settings.
        """
        ...

    async def update_subscription(self, subscription: Subscription) -> Subscription:
        """Replace a subscription's settings."""
        ...

    async def pass_over(self, name: str, published_before: float) -> Subscription:
        """Be done with what a subscription holds now and was published before a time, seconds since 1970."""
        ...

    async def delete_subscription(self, name: str) -> None:
        """Delete a subscription with its deferred messages and dead letters."""
        ...

    # Deduplication.

    async def reserve(self, topic: Topic, wanted: Sequence[tuple[Message, str]]) -> Sequence[Reservation]:
        """Take the deduplication ids of messages, given with the ids they would have.

        What is taken and not confirmed in time, or released, or taken by a replica whose lease has ended, is
        given to the next with the same message id.
        """
        ...

    async def confirmed(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Remember that messages with deduplication ids are with the broker."""
        ...

    async def released(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Let the next one publish what was reserved: whether it is with the broker is unknown."""
        ...

    async def tidy(self) -> None:
        """Forget what is too old to matter."""
        ...

    # Deferred messages.

    def news(self) -> asyncio.Event:
        """Set when something is deferred next."""
        ...

    async def defer(self, entries: Sequence[Deferral]) -> None:
        """Keep messages until their time."""
        ...

    def due(self, limit: int) -> AbstractAsyncContextManager[list[Due]]:
        """Messages whose time has come, which nobody else gets meanwhile.

        They are forgotten when the block ends, and kept when it raises or dies.
        """
        ...

    async def earliest(self) -> float | None:
        """When the next message is due."""
        ...

    async def deferred(self, subscription: str) -> int:
        """How many messages wait for their time."""
        ...

    async def tallies(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many messages wait for their time, and how many are dead, by subscription."""
        ...

    async def drop_deferred(self, subscription: str) -> None:
        """Forget the messages of a subscription, with those in lines."""
        ...

    # Messages in the lines of their keys.

    async def park(self, subscription: str, entries: Sequence[Parked], guard: Guard | None) -> None:
        """Keep messages; `guard` is called in the transaction, and prevents it by raising."""
        ...

    async def unpark(self, subscription: str, arrived: Sequence[Carried]) -> None:
        """Forget messages that are over, given as they arrived, and remember that as `finish` does."""
        ...

    async def lines(self, subscription: str) -> tuple[dict[str, int], int]:
        """How many messages there are of each key, and the last position of all; those that are over go."""
        ...

    async def parked(
        self, subscription: str, lines: Mapping[str, int], *, limit: int
    ) -> dict[str, list[Parked]]:
        """Messages of keys, in order, of each key so many after a position."""
        ...

    async def recall(self, subscription: str, arrived: Sequence[Carried]) -> list[Carried | None]:
        """Messages in lines, given as they arrived; none for what is there no more."""
        ...

    async def set_aside(self, subscription: str) -> int:
        """How many messages are in lines."""
        ...

    async def pass_over_parked(self, subscription: Subscription) -> dict[str, list[int]]:
        """Forget messages that Seek has passed over; the positions of the others, by key."""
        ...

    async def parked_messages(self, subscription: str, limit: int) -> list[Carried]:
        """Messages of all keys, in the order in which they came."""
        ...

    async def finish(self, subscription: str, arrived: Sequence[Carried]) -> None:
        """Remember, for as long as deduplication ids are, that deliveries are over, given as they arrived."""
        ...

    async def settled(self, subscription: str, arrived: Sequence[Carried]) -> list[bool]:
        """For each message that came, whether it is over: finished, dead, in a line, deferred anew."""
        ...

    # Dead letters.

    async def bury(self, subscription: str, carried: Carried, reason: str) -> None:
        """Give up a message: to the dead letter topic, or here if there is none or nobody hears it."""
        ...

    async def dead_letters(
        self, subscription: str, where: Where, *, limit: int, after: int
    ) -> list[DeadLetter]:
        """Read dead letters, oldest first."""
        ...

    async def dead_letter_stats(self, subscription: str) -> DeadLetterStats:
        """Count dead letters."""
        ...

    async def redrive(self, subscription: str, where: Where, how: Redrive) -> int:
        """Defer dead letters to the time of their delivery; each moves alone, so that a death loses none.

        Raises:
            FailedPreconditionError: Nobody subscribes to the topic they should go to.
        """
        ...

    async def purge(self, subscription: str, where: Where) -> int:
        """Delete dead letters."""
        ...

    # Snapshots.

    async def begin_snapshot(self, kept: Kept) -> None:
        """Insert a snapshot that keeps, but is not seen yet.

        Raises:
            AlreadyExistsError: There is one, or another is being made.
        """
        ...

    async def finish_snapshot(self, snapshot: Snapshot) -> None:
        """Let it be seen."""
        ...

    async def snapshot(self, name: str) -> Kept:
        """Read a snapshot.

        Raises:
            NotFoundError: There is none.
        """
        ...

    async def snapshots(self, topic: str, limit: int, after: str) -> list[Snapshot]:
        """Read snapshots in order of names."""
        ...

    async def update_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Replace labels and expiry."""
        ...

    async def drop_snapshot(self, kept: Kept) -> None:
        """Delete a snapshot; its stream is gone."""
        ...

    async def old_snapshots(self) -> list[Kept]:
        """Those that have expired or were never finished."""
        ...

    async def deferred_messages(self, subscription: str, limit: int) -> list[Carried]:
        """Messages that wait for their time, by that time."""
        ...
