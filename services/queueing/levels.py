"""Metrics of what subscriptions hold, counted when somebody asks for them and at no other time."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.queueing import metrics
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.queueing.domain import Broker, Levels

log = structlog.get_logger(__name__)

_FRESH_S = 5.0
"""Several who ask within this are told the same."""
_WITHIN_S = 8.0
"""Below Prometheus's own patience, 10 s by default."""
_COLUMNS = {
    "ready": "Messages that may be handed out; at most, while some were not compared with the filter.",
    "leased": "Messages with consumers.",
    "delayed": "Messages that wait for their time.",
    "dead_letters": "Messages that were given up and wait for somebody to look.",
    "oldest_seconds": "Age of the oldest message, where it is known; no dead letter.",
}


class LevelsCollector(Collector):
    """Counts on the service's loop for Prometheus's thread.

    What cannot be counted now is left out: a missing series is seen, an old one misleads.
    """

    def __init__(self, broker: Broker, *, fresh_s: float = _FRESH_S) -> None:
        """Set it up, on the loop that the broker belongs to.

        Args:
            broker: Whose subscriptions.
            fresh_s: For how long a count serves.
        """
        self._broker = broker
        self._fresh_s = fresh_s
        self._loop = asyncio.get_running_loop()
        self._counting = asyncio.Lock()
        self._counted: tuple[float, Levels | None] | None = None

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The same series without values: nothing is counted when it is registered."""
        return self._families(None)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Count; waits some seconds at most. Not on the loop itself."""
        work = self._now()
        try:
            levels = asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=_WITHIN_S)
        except (TimeoutError, CancelledError):
            levels = None
        except RuntimeError:  # the loop is closed
            work.close()
            levels = None
        return self._families(levels)

    async def _now(self) -> Levels | None:
        async with self._counting:
            if self._counted is not None and time.monotonic() - self._counted[0] < self._fresh_s:
                return self._counted[1]
            levels: Levels | None = None
            try:
                async with asyncio.timeout(_WITHIN_S):
                    levels = await self._broker.levels(limit=metrics.MOST_NAMES)
                    await self._forget_deleted(levels)
            except (PlexusError, TimeoutError) as error:
                if self._counted is None or self._counted[1] is not None:
                    reason = error.reason if isinstance(error, PlexusError) else "TIMEOUT"
                    log.warning("levels_not_counted", reason=reason)
            self._counted = (time.monotonic(), levels)
            return levels

    async def _forget_deleted(self, levels: Levels) -> None:
        if levels.complete:
            for counter in metrics.BY_SUBSCRIPTION:
                counter.keep(levels.subscriptions)
        topics = await self._broker.list_topics(limit=metrics.MOST_NAMES + 1)
        if len(topics) <= metrics.MOST_NAMES:
            for counter in metrics.BY_TOPIC:
                counter.keep([topic.name for topic in topics])

    def _families(self, levels: Levels | None) -> Iterable[GaugeMetricFamily]:
        up = GaugeMetricFamily("plexus_queue_up", "Whether the broker and the state answered the last count.")
        blocked = GaugeMetricFamily(
            "plexus_queue_broker_blocked", "Whether RabbitMQ takes no messages: its memory or disk is short."
        )
        families = {
            column: GaugeMetricFamily(f"plexus_queue_{column}", text, labels=["subscription"])
            for column, text in _COLUMNS.items()
        }
        up.add_metric([], float(levels is not None))
        if levels is not None:
            blocked.add_metric([], float(bool(levels.blocked)))
            now = time.time()
            for name, stats in levels.subscriptions.items():
                if metrics.label_of(name) != name:
                    continue
                for column, value in (
                    ("ready", stats.ready),
                    ("leased", stats.leased),
                    ("delayed", stats.delayed),
                    ("dead_letters", stats.dead),
                ):
                    families[column].add_metric([name], value)
                if stats.oldest:
                    families["oldest_seconds"].add_metric([name], max(0.0, now - stats.oldest))
        return [up, blocked, *families.values()]
