"""Request and reply over topics: the attributes that a request and its replies carry.

A request names the topic where its replies go and the call that they belong to; a reply says of which call
and what kind it is. Both are ordinary messages, delivered at least once: the first `result` or `error` of a
call counts, and what comes after it is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from services.queueing.domain import Message
from services.runtime.errors import PlexusError, UnavailableError
from services.runtime.status import CODES

if TYPE_CHECKING:
    from collections.abc import Mapping

REPLY_TO = "plexus-reply-to"
"""Of a request: the topic of its replies."""
CALL_ID = "plexus-call-id"
"""Of a request and of each of its replies."""
DEADLINE = "plexus-deadline"
"""Of a request, optional: when nobody waits any more, in milliseconds since 1970."""
REPLY = "plexus-reply"
"""Of a reply: its kind."""
CODE = "plexus-code"
"""Of an error: the name of a gRPC status code."""
REASON = "plexus-reason"
"""Of an error, optional: an UPPER_SNAKE constant for programs."""

MAX_ERROR = 4000
"""Characters of an error's text; the rest is cut."""
_KINDS = {code.name: kind for kind, code in CODES.items()}


class Kind(StrEnum):
    """What a reply is."""

    PROGRESS = "progress"
    RESULT = "result"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """What a request says about its replies; `deadline` is seconds since 1970, 0 is none."""

    reply_to: str
    call_id: str
    deadline: float = 0.0

    def attributes(self) -> dict[str, str]:
        """For the request's message."""
        found = {REPLY_TO: self.reply_to, CALL_ID: self.call_id}
        if self.deadline:
            found[DEADLINE] = str(round(self.deadline * 1000))
        return found


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: payload, or of an error its text with the gRPC code's name and a reason."""

    call_id: str
    kind: Kind
    data: bytes = b""
    code: str = ""
    reason: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind is not Kind.PROGRESS

    def message(self, *, correlation_id: str = "") -> Message:
        """To be published to the request's `reply_to`."""
        attributes = {CALL_ID: self.call_id, REPLY: self.kind.value}
        if self.code:
            attributes[CODE] = self.code
        if self.reason:
            attributes[REASON] = self.reason
        return Message(self.data, attributes, correlation_id=correlation_id)

    def error(self, metadata: Mapping[str, str] | None = None) -> PlexusError:
        """The domain error that an error reply means; a code without one here becomes INTERNAL."""
        text = self.data.decode(errors="replace")[:MAX_ERROR] or "the worker failed"
        kind = _KINDS.get(self.code, PlexusError)
        if kind is UnavailableError:
            return UnavailableError(text, reason=self.reason or None)
        return kind(text, reason=self.reason or "WORKER_FAILED", metadata=dict(metadata or {}))


def request_of(attributes: Mapping[str, str]) -> Request | None:
    """What a message says about its replies; None if it asks for none."""
    reply_to, call_id = attributes.get(REPLY_TO, ""), attributes.get(CALL_ID, "")
    if not reply_to or not call_id:
        return None
    deadline = attributes.get(DEADLINE, "")
    # Anybody may have published it: what is no number is no deadline.
    return Request(reply_to, call_id, int(deadline) / 1000 if deadline.isdecimal() else 0.0)


def reply_of(attributes: Mapping[str, str], data: bytes) -> Reply | None:
    """The reply that a message is; None if it is none."""
    call_id, kind = attributes.get(CALL_ID, ""), attributes.get(REPLY, "")
    if not call_id or kind not in set(Kind):
        return None
    return Reply(call_id, Kind(kind), data, attributes.get(CODE, ""), attributes.get(REASON, ""))
