"""What subscriptions are done with and keep for Seek: deliveries that nobody is given."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.queueing.backends.sqlite.database import Database
    from services.queueing.backends.sqlite.snapshots import Snapshots
    from services.queueing.resources import Subscription

_NEVER = 1e15
_PRUNE_EVERY = 256


def holder(name: str) -> str:
    """Under which they are: no subscription has such a name."""
    return f"={name}"


class Retained:
    """Keeps, gives back and forgets. Methods are jobs' parts, to be called in the writer's thread."""

    def __init__(self, database: Database, snapshots: Snapshots) -> None:
        self._db = database.connection
        self._snapshots = snapshots
        self._kept: Counter[str] = Counter()

    def keep(self, subscription: Subscription, number: int) -> str:
        """Take a delivery over; gives its ordering key."""
        key: str
        ((key,),) = self._db.execute(
            "SELECT ordering_key FROM deliveries WHERE subscription = ? AND message = ?",
            (subscription.name, number),
        ).fetchall()
        self._take(subscription, "AND message = ?", number)
        self._kept[subscription.name] += 1
        if self._kept[subscription.name] % _PRUNE_EVERY == 1:
            self.prune(subscription)
        return key

    def _take(self, subscription: Subscription, condition: str = "", *values: int) -> None:
        self._db.execute(
            "UPDATE deliveries SET subscription = ?, due = ?, lease = NULL, expires = NULL, ordering_key = ''"  # noqa: S608 - constants
            f" WHERE subscription = ? {condition}",
            (holder(subscription.name), _NEVER, subscription.name, *values),
        )

    def prune(self, subscription: Subscription) -> None:
        """Forget what was published longer ago than the subscription keeps it."""
        # Numbers rise with time, so the first young one ends the old.
        held = holder(subscription.name)
        self._snapshots.release(
            held,
            "AND message < coalesce((SELECT d.message FROM deliveries d JOIN messages m ON m.id = d.message"
            " WHERE d.subscription = ? AND m.published >= ? ORDER BY d.message LIMIT 1), 9e18)",
            (held, time.time() - subscription.ttl_s),
        )

    def seek(self, subscription: Subscription, published_from: float) -> None:
        """Let a subscription hold what was published at or after a time, as fresh, and nothing else."""
        self._take(subscription)
        self.prune(subscription)
        self._snapshots.give(holder(subscription.name), subscription, published_from)
        self._db.execute(
            "DELETE FROM deliveries WHERE subscription = ? AND message IN"
            " (SELECT message FROM deliveries WHERE subscription = ?)",
            (holder(subscription.name), subscription.name),
        )

    def release(self, subscription: str) -> None:
        """Forget all that is kept for a subscription."""
        self._snapshots.release(holder(subscription))
        del self._kept[subscription]
