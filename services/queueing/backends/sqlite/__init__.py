"""A broker in one SQLite file."""

from services.queueing.backends.sqlite.broker import SqliteBroker

__all__ = ["SqliteBroker"]
