"""Subscriptions that nobody uses any more are deleted, if they were made so.

Each replica remembers when a subscription was used through it, and writes that down every quarter of a
minute; so one that is used is kept whichever replica is asked, and nothing is written for a use itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Column, Double, MetaData, Table, Text, delete, select

from services.queueing.state import Schema
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from alembic.operations import Operations

    from services.queueing.domain import Broker
    from services.queueing.resources import Subscription
    from services.queueing.state import Database

log = structlog.get_logger(__name__)

POLL_S = 15.0
_GRACE_S = 600.0
"""After a start, consumers have this long to come back, if a subscription lives that long."""
_PAGE = 1000
_MAX_NOTED = 100_000

METADATA = MetaData()
_USES = Table(
    "expiry_uses",
    METADATA,
    Column("subscription", Text, primary_key=True),
    Column("used", Double, nullable=False),
)


def _first(operations: Operations) -> None:
    operations.create_table(
        "expiry_uses",
        Column("subscription", Text, primary_key=True),
        Column("used", Double, nullable=False),
    )


SCHEMA = Schema("expiry", METADATA, (_first,))


class Uses:
    """When subscriptions were used through this process, since somebody asked last."""

    def __init__(self) -> None:
        """Begin with none."""
        self._times: dict[str, float] = {}
        self._missed = -math.inf

    def note(self, subscription: str) -> None:
        """It is being used."""
        if len(self._times) >= _MAX_NOTED and subscription not in self._times:
            self._missed = time.monotonic()  # somebody asks for names that are not there
            return
        self._times[subscription] = time.monotonic()

    def noted(self, subscription: str) -> bool:
        """Whether it was used since they were taken."""
        return subscription in self._times

    @property
    def complete_s(self) -> float:
        """For how long no use was missed."""
        return time.monotonic() - self._missed

    def take(self) -> dict[str, float]:
        """How long ago each was used, in seconds; they are forgotten here."""
        now, times = time.monotonic(), self._times
        self._times = {}
        return {name: now - then for name, then in times.items()}

    def put_back(self, ages: dict[str, float]) -> None:
        """Remember again what could not be written down."""
        now = time.monotonic()
        self._times = {name: now - age for name, age in ages.items()} | self._times


class Expiry:
    """Deletes subscriptions that were not used for as long as they may be idle."""

    def __init__(
        self,
        broker: Broker,
        database: Database,
        uses: Uses,
        *,
        poll_s: float = POLL_S,
        grace_s: float = _GRACE_S,
    ) -> None:
        """Set it up.

        Args:
            broker: Whose subscriptions.
            database: Where all replicas write down when they were used.
            uses: Those of this process, which the broker tells.
            poll_s: How often that is; a subscription lives twice this longer than it must.
            grace_s: Nothing is deleted before this process has run for so long, or as long as the
                subscription may be idle.
        """
        self._broker = broker
        self._database = database
        self._uses = uses
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._started = time.monotonic()

    async def run(self) -> None:
        """For ever."""
        migrated = False
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                if not migrated:
                    await self._database.migrate(SCHEMA)
                    migrated = True
                await self.sweep()
            except PlexusError as error:
                log.warning("expiry_waits", reason=error.reason)

    async def sweep(self) -> list[str]:
        """Write down what was used, and delete what was not; the names of what was deleted.

        Raises:
            UnavailableError: The state or the broker cannot be reached; it is made up for the next time.
        """
        ages = self._uses.take()
        try:
            mortal = await self._mortal()
            idle = await self._written(mortal, ages)
        except BaseException:
            self._uses.put_back(ages)
            raise
        running_s, complete_s = time.monotonic() - self._started, self._uses.complete_s
        deleted = []
        for subscription in mortal:
            idle_s, used = idle[subscription.name]
            bound = subscription.expire_after_s
            over = idle_s > bound + 2 * self._poll_s and running_s >= min(bound, self._grace_s)
            if not over or complete_s < bound or self._uses.noted(subscription.name):
                continue
            if await self._delete(subscription, used):
                log.info("subscription_expired", subscription=subscription.name, idle_s=round(idle_s))
                deleted.append(subscription.name)
        return deleted

    async def _mortal(self) -> list[Subscription]:
        found: list[Subscription] = []
        after = ""
        while True:
            page = await self._broker.list_subscriptions(limit=_PAGE, after=after)
            found += [subscription for subscription in page if subscription.expire_after_s]
            if len(page) < _PAGE:
                return found
            after = page[-1].name

    async def _written(
        self, mortal: Sequence[Subscription], ages: dict[str, float]
    ) -> dict[str, tuple[float, float]]:
        """For how long each has been idle, and the time of its use that this is reckoned from."""
        async with self._database.reading() as connection:
            now = await self._database.now(connection)
            rows = {row.subscription: row.used for row in await connection.execute(select(_USES))}
        # What is seen for the first time counts as used: it may be old, and have got its bound just now.
        noted = {s.name: now - ages.get(s.name, 0.0) for s in mortal if s.name in ages or s.name not in rows}
        left = rows.keys() - {subscription.name for subscription in mortal}
        if noted or left:
            await self._write(noted, left)
        rows |= {name: max(used, rows.get(name, 0.0)) for name, used in noted.items()}
        # One that was deleted and made again was not used before.
        return {s.name: (now - max(rows[s.name], s.created), rows[s.name]) for s in mortal}

    async def _write(self, noted: dict[str, float], left: Collection[str]) -> None:
        async with self._database.transaction() as connection:
            if noted:
                statement = self._database.insert(_USES)
                latest = statement.excluded.used
                statement = statement.on_conflict_do_update(
                    index_elements=[_USES.c.subscription],
                    set_={"used": latest},
                    where=_USES.c.used < latest,
                )
                values = [{"subscription": name, "used": used} for name, used in noted.items()]
                await connection.execute(statement, values)
            if left:
                await connection.execute(delete(_USES).where(_USES.c.subscription.in_(left)))

    async def _delete(self, subscription: Subscription, used: float) -> bool:
        """Delete it, unless it was used meanwhile or another replica does; whether it was this one."""
        async with self._database.transaction() as connection:
            unused = (_USES.c.subscription == subscription.name) & (_USES.c.used == used)
            taken = await connection.execute(delete(_USES).where(unused))
        if not taken.rowcount:
            return False
        try:
            present = await self._broker.get_subscription(subscription.name)
            if present.created != subscription.created or not present.expire_after_s:
                return False
            await self._broker.delete_subscription(subscription.name)
        except NotFoundError:
            return False
        return True
