"""Configuration of the queueing service."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from services.runtime.config import Section


class QueueingConfig(Section):
    """Section `queueing`."""

    backend: Literal["sqlite", "rabbitmq"] = "sqlite"
    """Where messages are: in a file of this service, or in RabbitMQ with the rest in that file."""
    rabbitmq_url: SecretStr = SecretStr("amqp://plexus@localhost:5672/plexus")
    """Of the broker's virtual host, with user and password; amqps for TLS."""
    publish_deadline_s: float = 10.0
    """How long a publish waits for RabbitMQ's confirmation."""
    heartbeat_s: int = 10
    """Of connections to RabbitMQ: a dead peer is noticed after about three of these."""
    dedup_window_s: float = 600.0
    """How long a deduplication id is remembered."""
    max_waiting_writes: int = 20_000
    """Publishes, pulls and acknowledgements that may wait for the disk; one more is refused."""
    pubsub_port: int = 0
    """Of this machine, where clients of Google Pub/Sub are served without TLS or identity; 0 is none."""
    full_sync: bool = True
    """Whether a publish waits until the disk has it; without, the loss of power may lose messages."""
