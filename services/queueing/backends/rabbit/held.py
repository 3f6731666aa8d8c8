"""A message that RabbitMQ has delivered and nobody has settled; where a key's line goes on in the state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.resources import Subscription

Identity = tuple[str, str, int]
"""Of a delivery that is meant: message, copy, failed attempts. Two messages with the same one are doubles."""


@dataclass(slots=True)
class Held:
    """A message that RabbitMQ has delivered.

    Attributes:
        carried: The message.
        number: Rises in the order of arrival.
        arrived: Failed attempts that it came with.
        tag: Of the delivery, for its acknowledgement.
        redelivered: The broker has delivered it before.
        repeated: The broker may have it twice.
        not_before: Not handed out before this, seconds since 1970.
        since: When it came, or was last handed out, seconds since 1970.
        position: In its key's line in the state, 0 for none there.
        outside: It is in its key's line in the state only, or about to be.
        kept: The state has it.
        ready: It may be handed out.
        thin: Its content and attributes are in the state only.
        done: It has been settled.
    """

    carried: Carried
    number: int
    arrived: int
    tag: int = 0
    redelivered: bool = False
    repeated: bool = False
    not_before: float = 0.0
    since: float = 0.0
    position: int = 0
    outside: bool = False
    kept: bool = False
    ready: bool = False
    thin: bool = False
    done: bool = False

    def __lt__(self, other: Held) -> bool:
        return self.number < other.number

    @property
    def identity(self) -> Identity:
        """What tells it from others."""
        return self.carried.stored.message_id, self.carried.copy, self.arrived

    def lighten(self) -> None:
        """Leave to the state what it has, while nobody is to be handed it: thousands may be out for long."""
        if self.kept and not self.thin:
            self.carried = replace(self.carried, stored=replace(self.carried.stored, data=b"", attributes={}))
            self.thin = True

    def fill(self, kept: Carried) -> None:
        """Have again what the state has."""
        self.carried, self.thin = replace(self.carried, stored=kept.stored), False

    def is_past(self, subscription: Subscription) -> bool:
        """Whether Seek has passed over it."""
        return subscription.is_past(self.carried.stored.published, self.carried.made)

    def as_arrived(self) -> Carried:
        """What came."""
        return replace(self.carried, attempts=self.arrived)


@dataclass(slots=True)
class Rest:
    """Of a key whose line is in the state: messages only there, after which position, those to be written."""

    unread: int = 0
    last: int = 0
    unwritten: int = 0
