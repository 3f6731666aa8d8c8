"""Request and reply over topics: the attributes that requests and replies carry.

A request names the topic of its replies and the call that they belong to; the first `result` or `error` of a
call counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

REPLY_TO = "plexus-reply-to"
CALL_ID = "plexus-call-id"
DEADLINE = "plexus-deadline"
"""When nobody waits any more, in milliseconds since 1970."""
REPLY = "plexus-reply"
CODE = "plexus-code"
"""Name of a gRPC status code."""
REASON = "plexus-reason"

PROGRESS, RESULT, ERROR = "progress", "result", "error"

PREFIX = "plexus-reply."
"""Of the names of topics and subscriptions that carry replies."""
ALIVE = "plexus-alive"
"""Label of such a topic: when its owner was last there, in seconds since 1970; the service deletes others."""


@dataclass(frozen=True, slots=True)
class Request:
    """Where the replies to a message go; `deadline` is seconds since 1970, 0 without one."""

    reply_to: str
    call_id: str
    deadline: float

    def reply(self, kind: str, data: bytes, *, code: str = "", reason: str = "") -> pb.Message:
        """A reply, to be published to `reply_to`; replies of one call stay in order."""
        attributes = {CALL_ID: self.call_id, REPLY: kind}
        if code:
            attributes[CODE] = code
        if reason:
            attributes[REASON] = reason
        return pb.Message(data=data, attributes=attributes, ordering_key=self.call_id)


def request_of(attributes: Mapping[str, str]) -> Request | None:
    """What a message says about its replies; None if it wants none."""
    reply_to, call_id = attributes.get(REPLY_TO, ""), attributes.get(CALL_ID, "")
    deadline = attributes.get(DEADLINE, "")
    if not reply_to or not call_id:
        return None
    return Request(reply_to, call_id, int(deadline) / 1000 if deadline.isdecimal() else 0.0)
