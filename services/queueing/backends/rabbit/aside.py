"""Keys of ordered subscriptions that would fill the window: their messages wait in the state instead.

RabbitMQ hands out a queue from its head, so many messages at a time. When all of these are with consumers,
in a pause, or behind others of their keys, whoever consumes other keys gets nothing. Then whole lines move to
the state, beginning with their first message, and what comes for these keys goes behind them, until they are
short again: so what the state has of a key is always older than what RabbitMQ has of it.

Of a message that is in the state and with a consumer, or in a pause, nothing stays here but what tells it
from others: its content is read again when it is to be handed out again. Of those that may be handed out,
about a thousand are here; the others are read when these have gone.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from services.queueing.backends.rabbit.held import Held
from services.queueing.backends.rabbit.state import Parked
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.backends.rabbit.alarm import Alarm
    from services.queueing.backends.rabbit.holding import Holding
    from services.queueing.backends.rabbit.session import Current, Session, Settling

log = structlog.get_logger(__name__)

PATIENCE_S = 1.0
"""How long a key stands still before it is set aside."""
_LOOK_S = 0.25
_WRITE = 500
_READ = 100
_RETRY_S = 0.2
_FAR_S = 3600.0


class Aside:
    """Moves lines of a window's session; `run` is its life."""

    def __init__(self, current: Current, settling: Settling, alarm: Alarm, *, room: int, most: int) -> None:
        """Set it up.

        Args:
            current: Of the window.
            settling: Keeps the lines.
            alarm: Of the window.
            room: Messages that the broker delivers ahead.
            most: Messages that may be in the state; what comes after them stays in the window.
        """
        self._most = most
        self._looked = 0.0
        self._told = False
        self._sought = current.subscription.sought
        self._current = current
        self._settling = settling
        self._alarm = alarm
        self._room = room
        self._working = asyncio.Lock()

    def working(self) -> asyncio.Lock:
        """While this is held nothing is moved."""
        return self._working

    async def begin(self, session: Session) -> None:
        """Bring in what waits in the state, before anything comes over the session's channel.

        Raises:
            UnavailableError: The state cannot be reached.
        """
        if self._current.subscription.ordered:
            async with self._working:
                self._sought = self._current.subscription.sought
                if self._sought:
                    await self._settling.pass_over(self._current.subscription)
                counts, last = await self._settling.lines(self._current.subscription)
                session.holding.resume(counts, last)
                await self._read(session)

    def next_time(self, now: float) -> float:
        """When to look again."""
        return now + (_LOOK_S if self._is_full() else _FAR_S)

    def _is_full(self) -> bool:
        return self._current.subscription.ordered and self._current.session.out * 10 >= self._room * 9

    def look(self, now: float) -> None:
        """Set lines aside, the longest ones first, if the window is full of them and has nothing else."""
        session, holding = self._current.session, self._current.session.holding
        if not (self._is_full() and holding.idle) or now < self._looked + _LOOK_S:
            return
        self._looked = now
        name = self._current.subscription.name
        if holding.parked >= self._most:
            if not self._told:
                log.warning("no_more_set_aside", subscription=name, messages=holding.parked)
            self._told = True
            return
        self._told = False
        keys = holding.crowding(now - PATIENCE_S, session.out - self._room // 2)
        for key in keys:
            holding.set_aside(key)
        if keys:
            log.info("keys_set_aside", subscription=name, keys=len(keys), messages=holding.parked)
            self._current.errands.set()

    async def run(self) -> None:
        """Write and read what there is to, for ever."""
        while True:
            await self._current.errands.wait()
            self._current.errands.clear()
            try:
                async with self._working:
                    await self._work(self._current.session)
            except PlexusError as error:
                name = self._current.subscription.name
                log.warning("messages_not_set_aside", subscription=name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                self._current.errands.set()

    async def _work(self, session: Session) -> None:
        while session is self._current.session:
            wrote = await self._write(session)
            await self._read(session)
            if not wrote:
                break
        subscription, holding = self._current.subscription, session.holding
        if subscription.sought != self._sought:
            if holding.parked:
                holding.recount(await self._settling.pass_over(subscription))
            self._sought = subscription.sought

    async def _write(self, session: Session) -> bool:
        """Write some, and tell the broker; whether there was anything to do."""
        holding, subscription = session.holding, self._current.subscription
        batch = holding.unwritten_next(min(_WRITE, self._most - holding.parked))
        if batch:
            entries = [Parked(held.position, held.carried, held.arrived) for held in batch]
            await self._settling.park(subscription, entries)
            holding.written(batch)
            await session.tell(batch)
        if holding.leftover:
            over = list(holding.leftover)
            await self._settling.unpark(subscription, [held.as_arrived() for held in over])
            del holding.leftover[: len(over)]
        return bool(batch)

    async def _read(self, session: Session) -> None:
        holding, subscription = session.holding, self._current.subscription
        while wanting := holding.wanting(_WRITE):
            rows = await self._settling.recall(subscription, [held.as_arrived() for held in wanting])
            now = time.time()
            for held, row in zip(wanting, rows, strict=True):
                holding.filled(held, row, now)
            self._tell(now)
        while True:
            lines, limit = holding.hungry(_READ)
            if not lines:
                return
            parked = await self._settling.parked(subscription, lines, limit=limit)
            now = time.time()
            for key in lines:
                self._refill(holding, key, parked[key], now, complete=len(parked[key]) < limit)
            self._tell(now)

    def _refill(
        self, holding: Holding, key: str, rows: Sequence[Parked], now: float, *, complete: bool
    ) -> None:
        found = [
            Held(row.carried, next(self._current.numbers), row.arrived, since=now, position=row.position)
            for row in rows
        ]
        past = {held.number for held in found if not held.carried.wanted(self._current.subscription)}
        holding.refill(key, found, now, complete=complete, past=past)
        if past:
            self._current.errands.set()

    def _tell(self, now: float) -> None:
        """There may be something to hand out."""
        self._alarm.plan(now)
        self._alarm.wake()
