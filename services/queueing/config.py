"""Configuration of the queueing service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from services.runtime.config import Section


class QueueingConfig(Section):
    """Section `queueing`."""

    backend: Literal["sqlite", "rabbitmq"] = "sqlite"
    """Where messages are: in a file of this service, or in RabbitMQ with the rest in that file."""
    rabbitmq_url: SecretStr = SecretStr("amqp://plexus@localhost:5672/plexus")
    """Of the broker's virtual host, with user and password; amqps for TLS."""
    state_url: SecretStr = SecretStr("")
    """Database of what a broker cannot hold: empty for a SQLite file of this service; several replicas share
    postgresql://user:password@host:port/database, with `?sslmode=verify-full&sslrootcert=…` for TLS."""
    state_pool_size: int = Field(default=10, ge=1, le=1000)
    """Most connections of a replica to PostgreSQL."""
    state_statement_s: float = Field(default=15.0, gt=0)
    """How long PostgreSQL may take for a statement."""
    publish_deadline_s: float = 10.0
    """How long a publish waits for RabbitMQ's confirmation."""
    heartbeat_s: int = 10
    """Of connections to RabbitMQ: a dead peer is noticed after about three of these."""
    dedup_window_s: float = 600.0
    """How long a deduplication id is remembered."""
    max_waiting_writes: int = 20_000
    """Publishes, pulls and acknowledgements that may wait for the disk; one more is refused."""
    max_set_aside: int = Field(default=100_000, ge=0)
    """Messages of an ordered subscription on RabbitMQ that wait in the database so that keys that stand still
    stop no others: the first one of each such key, and what waits behind it. With more, the others wait."""
    pubsub_port: int = 0
    """Of this machine, where clients of Google Pub/Sub are served without TLS or identity; 0 is none."""
    saga_concurrency: int = Field(default=64, ge=1, le=10_000)
    """Sagas that a replica drives at once."""
    saga_lease_s: float = Field(default=15.0, ge=0.1)
    """How long a saga is left to a replica that has fallen silent, before another goes on with it."""
    saga_retention_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """How long a saga is kept after its end."""
    max_running_sagas: int = Field(default=10_000, ge=1)
    """Sagas that have not ended; one more is refused."""
    default_topics_retention_s: float = Field(default=7 * 24 * 3600.0, ge=1, le=366 * 24 * 3600.0)
    """How long the logs of workflow-events, error-events and audit-events keep an event: set when they are
    made, at the first start; later by UpdateTopic."""
    full_sync: bool = True
    """Whether a publish waits until the disk has it; without, the loss of power may lose messages."""
    max_schedules: int = 100_000
    """How many schedules there may be."""
    schedule_min_interval_s: float = 1.0
    """Shortest interval of a schedule's `every`."""
    schedule_poll_s: float = 5.0
    """Within this a replica notices what others changed in the schedules, and that the clock was set."""
