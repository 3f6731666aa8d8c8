"""Who publishes what: each firing is written down once, before it is published, and has one owner at a time.

A time that has come is turned into a run and the schedule set to its next time in one transaction; so it is
decided once, by whichever replica comes first. The run's owner publishes it, with a deduplication id that the
run gives, and marks it. If the owner dies in between, the run's lease ends, another replica publishes it with
the same id, and the broker stores it once. For that its window of ids has to be longer than a lease.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, case, delete, func, insert, select, update

from services.queueing.schedules.domain import HISTORY, Firing, Run, RunState, microseconds
from services.queueing.schedules.domain import instant as instant_of
from services.queueing.schedules.planning import plan, superseded
from services.queueing.schedules.store import locked
from services.queueing.schedules.tables import (
    RUNS,
    SCHEDULES,
    decoded,
    progress,
    run_columns,
    run_of,
    schedule_of,
)
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from services.queueing.schedules.domain import Schedule
    from services.queueing.state import Database

MAX_FIRINGS = 1000
"""Firings that one decision leads to; further schedules wait for the next."""
_AT_A_STRETCH = 50
"""Schedules that are planned before others of this process have a turn."""
CLOCK_STEP = timedelta(hours=3)
"""A clock that is set back by less only waits until it has caught up, as with Debian's cron."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a firing ended: with a message, or an error that repeating would not help."""

    firing: Firing
    message_id: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Decided:
    """What is to be published, how many times of which schedules were missed, and which cannot be read.

    A schedule cannot be read if a newer library refuses what an older one took.
    """

    firings: list[Firing] = field(default_factory=list)
    missed: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was decided."""
        return not (self.firings or self.missed or self.unreadable)

    def and_also(self, other: Decided) -> Decided:
        """Both together."""
        missed = dict(self.missed)
        for name, count in other.missed.items():
            missed[name] = missed.get(name, 0) + count
        unreadable = self.unreadable | other.unreadable
        return Decided([*self.firings, *other.firings], missed, unreadable)


class Ledger:
    """The runs of all schedules, for one replica.

    All calls raise UnavailableError while the database cannot be reached; what they were to do may be done
    all the same, and repeating them does no harm. Who changes runs has their schedules locked, in order of
    their ids or passing over those that others have, so that nobody waits in a circle.
    """

    def __init__(self, database: Database, owner: str, lease: timedelta) -> None:
        """Set it up.

        Args:
            database: Of the state, migrated.
            owner: This replica's name, of this process alone.
            lease: For how long a firing is its own.
        """
        self._database = database
        self._owner = owner
        self._lease = lease

    async def decide(self, now: datetime, *, limit: int) -> Decided:
        """Turn times that have come into runs of this replica.

        Args:
            now: What is due by then.
            limit: Of so many schedules.
        """
        decided = Decided()
        async with self._database.transaction() as connection:
            query = (
                select(SCHEDULES)
                .where(SCHEDULES.c.next_fire <= microseconds(now))
                .order_by(SCHEDULES.c.next_fire)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            changes: list[dict[str, Any]] = []
            runs: list[dict[str, Any]] = []
            for position, row in enumerate(await connection.execute(query)):
                if position % _AT_A_STRETCH == 0:
                    await asyncio.sleep(0)
                try:
                    before = schedule_of(row)
                except InvalidArgumentError as error:
                    decided.unreadable[row.name] = error.message
                    continue
                step = plan(before, now)
                changes.append(
                    {
                        "of": before.uid,
                        "decided": microseconds(now),
                        **progress(step.schedule),
                    }
                )
                runs += [run_columns(before.uid, run, self._owner, now + self._lease) for run in step.runs]
                decided.firings.extend(
                    _firing(before, run) for run in step.runs if run.state is RunState.PENDING
                )
                if step.schedule.missed > before.missed:
                    decided.missed[before.name] = step.schedule.missed - before.missed
                if len(decided.firings) >= MAX_FIRINGS:
                    break
            for name, why in decided.unreadable.items():
                stopped = {"next_due": None, "next_fire": None, "last_error": why}
                await connection.execute(update(SCHEDULES).where(SCHEDULES.c.name == name).values(stopped))
            if changes:
                await connection.execute(
                    update(SCHEDULES)
                    .where(SCHEDULES.c.uid == bindparam("of"))
                    .values({name: bindparam(name) for name in changes[0] if name != "of"}),
                    changes,
                )
            if runs:
                await connection.execute(insert(RUNS), runs)
        return decided

    async def take_over(self, now: datetime, *, limit: int) -> Decided:
        """Make runs this replica's own whose owner did not publish them in time.

        What has become late meanwhile, and that the schedule does not want made up, is missed instead.
        """
        decided = Decided()
        async with self._database.transaction() as connection:
            late = RUNS.c.lease <= microseconds(now)
            owners = select(RUNS.c.uid).where(late).order_by(RUNS.c.lease).limit(limit)
            found = await connection.execute(
                select(SCHEDULES).where(SCHEDULES.c.uid.in_(owners)).with_for_update(skip_locked=True)
            )
            schedules = {row.uid: schedule_of(row) for row in found}
            if not schedules:
                return decided
            rows = await connection.execute(
                select(RUNS)
                .where(late, RUNS.c.uid.in_(schedules))
                .order_by(RUNS.c.lease, RUNS.c.uid, RUNS.c.number)
                .limit(limit)
            )
            taken: list[dict[str, Any]] = []
            missed: list[dict[str, Any]] = []
            for row in rows:
                schedule, run = schedules[row.uid], run_of(row)
                key = {"of": row.uid, "which": row.number}
                if superseded(schedule, run, now):
                    missed.append(key)
                    decided.missed[schedule.name] = decided.missed.get(schedule.name, 0) + 1
                    continue
                taken.append(key)
                if row.definition is not None:
                    definition = decoded(bytes(row.definition), microseconds(schedule.created))
                    schedule = replace(schedule, definition=definition)
                decided.firings.append(_firing(schedule, run))
            if taken:
                lease = microseconds(now + self._lease)
                await connection.execute(_run_update(owner=self._owner, lease=lease), taken)
            if missed:
                values = {"state": RunState.MISSED, "ended": microseconds(now), "lease": None}
                await connection.execute(_run_update(**values), missed)
                await connection.execute(
                    update(SCHEDULES)
                    .where(SCHEDULES.c.uid == bindparam("of"))
                    .values(missed=SCHEDULES.c.missed + 1, firings=SCHEDULES.c.firings - 1),
                    [{"of": key["of"]} for key in missed],
                )
        return decided

    async def begin(self, name: str, now: datetime) -> Firing:
        """Write down a run by hand as this replica's own.

        Raises:
            NotFoundError: There is no such schedule.
        """
        async with self._database.transaction() as connection:
            schedule = await locked(connection, name)
            run = Run(schedule.runs + 1, now, RunState.PENDING, schedule.revision, manual=True)
            await connection.execute(
                update(SCHEDULES).where(SCHEDULES.c.uid == schedule.uid).values(runs=run.number)
            )
            columns = run_columns(schedule.uid, run, self._owner, now + self._lease)
            await connection.execute(insert(RUNS).values(columns))
            return _firing(schedule, run)

    async def finish(self, outcomes: Sequence[Outcome], now: datetime) -> None:
        """Mark how firings ended, and forget what is older than the history."""
        if not outcomes:
            return
        ended = microseconds(now)
        newest: dict[str, Outcome] = {}
        for outcome in outcomes:
            known = newest.setdefault(outcome.firing.uid, outcome)
            if outcome.firing.run.number > known.firing.run.number:
                newest[outcome.firing.uid] = outcome
        why = bindparam("why", type_=Text)
        async with self._database.transaction() as connection:
            await connection.execute(
                update(SCHEDULES)
                .where(SCHEDULES.c.uid == bindparam("of"))
                .values(last_error=why, last_fired=case((why == "", ended), else_=SCHEDULES.c.last_fired)),
                [{"of": uid, "why": newest[uid].error} for uid in sorted(newest)],
            )
            done = _run_update(
                state=bindparam("how"),
                message_id=bindparam("message"),
                error=why,
                ended=ended,
                lease=None,
                definition=None,
            )
            await connection.execute(
                done,
                [
                    {
                        "of": outcome.firing.uid,
                        "which": outcome.firing.run.number,
                        "how": RunState.FAILED if outcome.error else RunState.PUBLISHED,
                        "message": outcome.message_id,
                        "why": outcome.error,
                    }
                    for outcome in sorted(
                        outcomes, key=lambda each: (each.firing.uid, each.firing.run.number)
                    )
                ],
            )
            old = [
                {"of": uid, "until": outcome.firing.run.number - HISTORY}
                for uid, outcome in newest.items()
                if outcome.firing.run.number > HISTORY
            ]
            if old:
                await connection.execute(
                    delete(RUNS).where(
                        RUNS.c.uid == bindparam("of"),
                        RUNS.c.number <= bindparam("until"),
                        RUNS.c.state != RunState.PENDING,
                    ),
                    old,
                )

    async def give_back(self, firings: Sequence[Firing], now: datetime) -> None:
        """Let anybody publish what could not be published now."""
        if not firings:
            return
        keys = sorted((firing.uid, firing.run.number) for firing in firings)
        async with self._database.transaction() as connection:
            await connection.execute(
                _run_update(lease=microseconds(now)).where(RUNS.c.owner == self._owner),
                [{"of": uid, "which": number} for uid, number in keys],
            )

    async def earliest(self) -> datetime | None:
        """When the next schedule fires or the next lease ends; None without any."""
        async with self._database.reading() as connection:
            found = [
                (await connection.execute(select(func.min(column)))).scalar_one()
                for column in (SCHEDULES.c.next_fire, RUNS.c.lease)
            ]
        return min((instant_of(each) for each in found if each is not None), default=None)

    async def set_back(self, now: datetime, *, limit: int) -> int:
        """Let schedules begin from now that a clock far in the future has carried on; how many there were."""
        ahead = SCHEDULES.c.decided > microseconds(now + CLOCK_STEP)
        async with self._database.reading() as connection:
            if (await connection.execute(select(SCHEDULES.c.uid).where(ahead).limit(1))).first() is None:
                return 0
        async with self._database.transaction() as connection:
            query = select(SCHEDULES).where(ahead).limit(limit).with_for_update(skip_locked=True)
            changes = [
                {
                    "of": row.uid,
                    "decided": microseconds(now),
                    **progress(schedule_of(row).from_now(now)),
                }
                for row in await connection.execute(query)
            ]
            if changes:
                await connection.execute(
                    update(SCHEDULES)
                    .where(SCHEDULES.c.uid == bindparam("of"))
                    .values({name: bindparam(name) for name in changes[0] if name != "of"}),
                    changes,
                )
        return len(changes)


def _firing(schedule: Schedule, run: Run) -> Firing:
    definition = schedule.definition
    return Firing(
        schedule.uid, schedule.name, schedule.fires(run.due), run, definition.topic, definition.message
    )


def _run_update(**values: Any) -> Any:
    """Of the pending run `which` of the schedule `of`."""
    return (
        update(RUNS)
        .where(
            RUNS.c.uid == bindparam("of"),
            RUNS.c.number == bindparam("which"),
            RUNS.c.state == RunState.PENDING,
        )
        .values(**values)
    )
