"""Messages as RabbitMQ carries them: the content as it is, all that is said of it in one header."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from services.queueing.domain import Message, Stored
from services.queueing.resources import Backoff, Priority, RetryPolicy
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aio_pika.abc import AbstractIncomingMessage

    from services.queueing.resources import Subscription

HEADER = "plexus"
MARKER = "plexus-marker"
AGAIN = "plexus-again"
"""Header of a message that RabbitMQ may have already: an earlier publish of it was not confirmed."""


@dataclass(slots=True)
class Carried:
    """A message on its way.

    Attributes:
        stored: The message.
        retry: Its own policy.
        attempts: Deliveries that failed.
        history: Pairs of time and reason.
        expires: When it has waited too long, seconds since 1970; 0 is never.
        copy: Tells deliveries that are meant apart from those that a retry made.
        once: It was published with a deduplication id: doubles are not handed out.
        made: When this copy of it was, seconds since 1970; 0 is when it was published.
    """

    stored: Stored
    retry: RetryPolicy | None = None
    attempts: int = 0
    history: list[tuple[float, str]] = field(default_factory=list)
    expires: float = 0.0
    copy: str = ""
    once: bool = False
    made: float = 0.0

    def wanted(self, subscription: Subscription) -> bool:
        """Whether it is for a subscription: its filter lets it through, and Seek has not passed over it."""
        if subscription.sought and subscription.is_past(self.stored.published, self.made):
            return False
        return subscription.wants(self.stored.attributes)


def fresh(topic: str, message: Message, message_id: str, now: float) -> Carried:
    """A message that is being published."""
    stored = Stored(
        message_id=message_id,
        topic=topic,
        data=message.data,
        attributes=message.attributes,
        published=now,
        ordering_key=message.ordering_key,
        priority=message.priority,
        correlation_id=message.correlation_id,
    )
    expires = now + message.delay_s + message.ttl_s if message.ttl_s else 0.0
    return Carried(stored, message.retry, expires=expires, once=bool(message.dedup_id))


def again(carried: Carried) -> Carried:
    """A further delivery of a message, from the beginning."""
    return Carried(carried.stored, carried.retry, copy=uuid.uuid4().hex, once=carried.once, made=time.time())


def head(carried: Carried) -> str:
    """All that is said of a message, but its content and id."""
    stored, retry = carried.stored, carried.retry
    said = {
        "topic": stored.topic,
        "attributes": stored.attributes,
        "published": stored.published,
        "ordering_key": stored.ordering_key,
        "priority": int(stored.priority),
        "correlation_id": stored.correlation_id,
        "retry": retry and {name: getattr(retry, name) for name in RetryPolicy.__slots__},
        "attempts": carried.attempts,
        "history": carried.history,
        "expires": carried.expires,
        "copy": carried.copy,
        "once": carried.once,
        "made": carried.made,
    }
    return to_json({key: value for key, value in said.items() if value}).decode()


@dataclass(slots=True)
class Packet:
    """A message as it is published: content, headers, id."""

    data: bytes
    headers: dict[str, str | int]
    message_id: str


def encode(carried: Carried, *, repeated: bool = False) -> Packet:
    """What is published; `repeated` says that RabbitMQ may have it already."""
    headers: dict[str, str | int] = {HEADER: head(carried)}
    if repeated:
        headers[AGAIN] = 1
    return Packet(carried.stored.data, headers, carried.stored.message_id)


def decode(message: AbstractIncomingMessage) -> Carried:
    """What came, as aio-pika gives it."""
    return read(message.message_id, message.headers, message.body, topic=message.routing_key or "")


def read(message_id: str | None, headers: Mapping[str, object], data: bytes, *, topic: str) -> Carried:
    """What came; of a message that others put into the queue, with nothing said of it that makes sense."""
    message_id = message_id or uuid.uuid4().hex
    try:
        return from_head(str(headers[HEADER]), message_id, data, topic=topic)
    except (KeyError, ValueError, TypeError, AttributeError, PlexusError):
        said = {"published": time.time(), "priority": int(Priority.NORMAL)}
        return from_head(json.dumps(said), message_id, data, topic=topic)


def from_head(text: str, message_id: str, data: bytes, *, topic: str = "") -> Carried:
    """The message of which `head` says this."""
    said = json.loads(text)
    retry = said.get("retry")
    return Carried(
        stored=Stored(
            message_id=message_id,
            topic=said.get("topic", topic),
            data=data,
            attributes=said.get("attributes", {}),
            published=said.get("published", 0.0),
            ordering_key=said.get("ordering_key", ""),
            priority=Priority(said.get("priority", 0)),
            correlation_id=said.get("correlation_id", ""),
        ),
        retry=_policy(**retry) if retry else None,
        attempts=said.get("attempts", 0),
        history=[(when, why) for when, why in said.get("history", [])],
        expires=said.get("expires", 0.0),
        copy=said.get("copy", ""),
        once=said.get("once", False),
        made=said.get("made", 0.0),
    )


@lru_cache(maxsize=1024)
def _policy(backoff: str, **numbers: Any) -> RetryPolicy:
    """A policy, of which many messages say the same: it is checked once."""
    return RetryPolicy(Backoff(backoff), **numbers)
