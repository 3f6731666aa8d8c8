"""Why RabbitMQ blocks a connection: it says so, and aiormq tells it to its log and to nobody else."""

from __future__ import annotations

import logging

_SOURCE = logging.getLogger("aiormq.connection")


class Blocked(logging.Handler):
    """Follows one connection, from `follow` to `end`.

    Attributes:
        reason: In the broker's words; empty while it takes messages.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reason = ""
        self._connection: object = None

    def follow(self, connection: object) -> None:
        """Listen for this connection, and no more for the one before."""
        self._connection, self.reason = connection, ""
        if self not in _SOURCE.handlers:
            _SOURCE.addHandler(self)

    def end(self) -> None:
        """Listen no more."""
        self._connection, self.reason = None, ""
        _SOURCE.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Look at what is logged."""
        if not isinstance(record.args, tuple) or not record.args or record.args[0] is not self._connection:
            return
        text = str(record.msg)
        if "unblocked" in text:
            self.reason = ""
        elif "blocked" in text:
            self.reason = str(record.args[-1])
