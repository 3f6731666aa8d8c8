"""What exists in RabbitMQ: names and arguments, the same for 3.10 and 4.x.

A message goes to the exchange `plexus.topics` under `<priority>.<topic>`; each subscription binds a
quorum queue for each priority, since quorum queues of 3.10 have none within, or one for all if it is ordered.
What is meant for one queue alone goes through `plexus.direct`. The delivery limit is no policy of ours: it is
there because 4.x has one by default, and because with it a returned message keeps its place on 3.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.queueing.resources import Priority

if TYPE_CHECKING:
    from services.queueing.resources import Subscription, Topic

TOPICS, DIRECT, DEAD = "plexus.topics", "plexus.direct", "plexus.dead"
EXCHANGES = {TOPICS: "topic", DIRECT: "direct", DEAD: "fanout"}
UNCLAIMED = "plexus.dead.unclaimed"
"""Where the broker puts what it gives up by itself: nothing, unless a queue's delivery limit is reached."""
DELIVERY_LIMIT = 1_000_000
PERMISSION = r"^plexus\..*"
_LEVELS = tuple(sorted(Priority, reverse=True))


def queue_arguments(*, ordered: bool) -> dict[str, Any]:
    """Arguments of a subscription's queue."""
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": DEAD,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    if ordered:
        arguments["x-single-active-consumer"] = True
    return arguments


def stream_arguments(topic: Topic) -> dict[str, Any]:
    """Arguments of a topic's log."""
    arguments: dict[str, Any] = {
        "x-queue-type": "stream",
        "x-max-age": f"{max(1, round(topic.retention_s))}s",
    }
    if topic.retention_bytes:
        arguments["x-max-length-bytes"] = topic.retention_bytes
        arguments["x-stream-max-segment-size-bytes"] = max(65_536, topic.retention_bytes // 4)
    return arguments


def levels(subscription: Subscription) -> tuple[Priority, ...]:
    """The priorities that have a queue of their own; order is stronger than priority."""
    return (Priority.NORMAL,) if subscription.ordered else _LEVELS


def level_of(subscription: Subscription, priority: Priority) -> Priority:
    """The queue in which a message of this priority waits."""
    return Priority.NORMAL if subscription.ordered else priority


def queue_name(subscription: str, level: Priority) -> str:
    """The queue of a subscription for a priority."""
    return f"plexus.subscription.{subscription}.{int(level)}"


def replica_name(address: str) -> str:
    """The queue at which a replica of the service is asked."""
    return f"plexus.replica.{address}"


def log_name(topic: str) -> str:
    """The stream of a topic."""
    return f"plexus.log.{topic}"


def snapshot_name(token: str) -> str:
    """The stream of a snapshot, of which a name may have one after the other."""
    return f"plexus.snapshot.{token}"


def snapshot_arguments(lives_s: float) -> dict[str, Any]:
    """Arguments of a snapshot's stream, which forgets nothing while the snapshot lives."""
    return {"x-queue-type": "stream", "x-max-age": f"{round(lives_s) + 86_400}s"}


def retained_name(subscription: str) -> str:
    """The stream of what a subscription retains."""
    return f"plexus.retained.{subscription}"


def retained_arguments(subscription: Subscription) -> dict[str, Any]:
    """Arguments of a subscription's stream."""
    return {"x-queue-type": "stream", "x-max-age": f"{max(1, round(subscription.ttl_s))}s"}


def routing_key(topic: str, priority: Priority) -> str:
    """Under which a message is published."""
    return f"{int(priority)}.{topic}"


def binding_key(subscription: Subscription, level: Priority) -> str:
    """Under which a subscription's queue gets messages; patterns are the broker's own."""
    level_word = "*" if subscription.ordered else str(int(level))
    return f"{level_word}.{subscription.topic}"


def definitions(vhost: str, user: str) -> dict[str, Any]:
    """What rabbitmq/definitions.json holds: everything that exists before the first subscription."""
    return {
        "vhosts": [{"name": vhost}],
        "users": [{"name": user, "password_hash": "", "tags": []}],
        "permissions": [
            {
                "user": user,
                "vhost": vhost,
                "configure": PERMISSION,
                "write": PERMISSION,
                "read": PERMISSION,
            }
        ],
        "exchanges": [
            {
                "name": name,
                "vhost": vhost,
                "type": kind,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for name, kind in EXCHANGES.items()
        ],
        "queues": [
            {
                "name": UNCLAIMED,
                "vhost": vhost,
                "durable": True,
                "auto_delete": False,
                "arguments": {"x-queue-type": "quorum"},
            }
        ],
        "bindings": [
            {
                "source": DEAD,
                "vhost": vhost,
                "destination": UNCLAIMED,
                "destination_type": "queue",
                "routing_key": "",
                "arguments": {},
            }
        ],
    }
