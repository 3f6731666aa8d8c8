"""Metrics of messages: what this replica carried, by topic or subscription."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram

from services.queueing.calls import PREFIX as REPLIES

if TYPE_CHECKING:
    from collections.abc import Collection

MOST_NAMES = 500
"""Topics, and subscriptions, that have series of their own."""
OTHERS = "(others)"
"""Label of those beyond."""
ALL_REPLIES = "(replies)"
"""Label of the topics and subscriptions that carry replies, which come and go with their callers."""


def label_of(name: str) -> str:
    """What a topic or subscription is called in metrics."""
    return ALL_REPLIES if name.startswith(REPLIES) else name


class ByName:
    """A counter by the name of a topic or subscription, with a bounded number of series."""

    def __init__(self, metric: str, text: str, label: str) -> None:
        self._counter = Counter(metric, text, [label])
        self._series: dict[str, Any] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Count for a name; from any thread."""
        series = self._series.get(name)
        if series is None:
            label = label_of(name)
            if label not in self._series and len(self._series) >= MOST_NAMES:
                label = OTHERS
            series = self._counter.labels(label)
            if label != OTHERS:
                self._series[label] = series
        series.inc(count)

    def keep(self, names: Collection[str]) -> None:
        """Forget the series of all others: what they belonged to is deleted."""
        for label in set(self._series) - {ALL_REPLIES} - set(names):
            del self._series[label]
            self._counter.remove(label)


PUBLISHED = ByName("plexus_queue_published_total", "Messages whose publication was confirmed.", "topic")
DELIVERED = ByName("plexus_queue_delivered_total", "Messages handed to consumers.", "subscription")
REDELIVERED = ByName(
    "plexus_queue_redelivered_total",
    "Those of them that were at their second or a later attempt.",
    "subscription",
)
ACKNOWLEDGED = ByName(
    "plexus_queue_acknowledged_total", "Messages that consumers were done with.", "subscription"
)
REFUSED = ByName("plexus_queue_refused_total", "Messages that consumers gave back as failed.", "subscription")
LATE = ByName(
    "plexus_queue_late_total",
    "Acknowledgements, refusals and extensions whose lease had ended before.",
    "subscription",
)
LEASES_EXPIRED = ByName(
    "plexus_queue_leases_expired_total",
    "Leases that ended with nothing said, each a failed attempt; counted when it is noticed.",
    "subscription",
)
GIVEN_UP = ByName(
    "plexus_queue_given_up_total",
    "Messages that became dead letters, or were sent on to a dead letter topic.",
    "subscription",
)
BY_TOPIC = (PUBLISHED,)
BY_SUBSCRIPTION = (DELIVERED, REDELIVERED, ACKNOWLEDGED, REFUSED, LATE, LEASES_EXPIRED, GIVEN_UP)
PUBLISH_SECONDS = Histogram(
    "plexus_queue_publish_seconds",
    "Time until a batch was confirmed: on disk, or by RabbitMQ.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PUBLISH_FAILURES = Counter(
    "plexus_queue_publish_failures_total", "Batches that were refused, by reason.", ["reason"]
)
