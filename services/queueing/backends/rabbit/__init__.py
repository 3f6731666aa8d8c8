"""A broker on RabbitMQ."""

from services.queueing.backends.rabbit.broker import RabbitBroker

__all__ = ["RabbitBroker"]
