"""The state of the RabbitMQ backend in a database."""

from services.queueing.backends.rabbit.store.store import SqlState

__all__ = ["SqlState"]
