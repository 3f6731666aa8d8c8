"""What an incoming call hands on to the calls made on its behalf: deadline, request id, trace context."""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""What the header may be; it is also the name of the attribute in which messages carry it."""


@dataclass(slots=True)
class CallContext:
    """Facts of the call in progress.

    Attributes:
        deadline: `time.monotonic()` at which the caller gives up; None without a deadline.
        request_id: Id that joins logs and errors of one user request across services.
        traceparent: W3C trace context header, empty if there is none.
    """

    deadline: float | None = None
    request_id: str = ""
    traceparent: str = ""

    def remaining_s(self) -> float | None:
        """Seconds left until the deadline (never negative), or None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


call_context: ContextVar[CallContext | None] = ContextVar("plexus_call_context", default=None)
"""Set by the server runtime for each call it handles."""
