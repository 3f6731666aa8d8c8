"""Keys of ordered subscriptions that would fill the window: their messages wait in the state instead.

RabbitMQ hands out a queue from its head, so many messages at a time. When all of these wait behind others of
their keys, whoever consumes other keys gets nothing. Then whole lines move to the state, beginning with their
first message, and what comes for these keys goes behind them, until they are short again: so what the state
has of a key is always older than what RabbitMQ has of it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from services.queueing.backends.rabbit.held import Held
from services.queueing.backends.rabbit.holding import KEPT
from services.queueing.backends.rabbit.state import Parked
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from services.queueing.backends.rabbit.alarm import Alarm
    from services.queueing.backends.rabbit.session import Current, Session, Settling

log = structlog.get_logger(__name__)

MAX_PARKED = 100_000
"""Of a subscription in the state; what comes after them stays in the window."""
PATIENCE_S = 1.0
"""How long a full window waits for its keys to move on."""
_WRITE = 500
_IN_MEMORY = 1000
_RETRY_S = 0.2
_FAR_S = 3600.0


class Aside:
    """Moves lines of a window's session; `run` is its life."""

    def __init__(self, current: Current, settling: Settling, alarm: Alarm, *, room: int) -> None:
        """Set it up.

        Args:
            current: Of the window.
            settling: Keeps the lines.
            alarm: Of the window.
            room: Messages that the broker delivers ahead.
        """
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
                counts, last = await self._settling.lines(self._current.subscription)
                session.holding.resume(counts, last)
                await self._read(session)

    def next_time(self, now: float) -> float:
        """When to look again."""
        return now + PATIENCE_S if self._is_full() else now + _FAR_S

    def _is_full(self) -> bool:
        return self._current.subscription.ordered and self._current.session.out * 10 >= self._room * 9

    def look(self) -> None:
        """Set lines aside, the longest ones first, if the window has been full of them for a while."""
        if not self._is_full():
            return
        session = self._current.session
        keys = session.holding.crowding(time.time() - PATIENCE_S, session.out - self._room // 2)
        for key in keys:
            session.holding.set_aside(key)
        if keys:
            log.info("keys_set_aside", subscription=self._current.subscription.name, keys=len(keys))
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
                return

    async def _write(self, session: Session) -> bool:
        """Write some, and tell the broker; whether there was anything to do."""
        holding, subscription = session.holding, self._current.subscription
        batch = holding.unwritten_next(min(_WRITE, MAX_PARKED - holding.parked))
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
        holding = session.holding
        while holding.hungry:
            key = next(iter(holding.hungry))
            limit = max(2, min(KEPT // 2, _IN_MEMORY // len(holding.aside)))
            after = holding.last_of(key)
            subscription = self._current.subscription
            rows = await self._settling.parked(subscription, key, after=after, limit=limit)
            now = time.time()
            found = [
                Held(row.carried, next(self._current.numbers), row.arrived, since=now, position=row.position)
                for row in rows
            ]
            past = {held.number for held in found if not held.carried.wanted(subscription)}
            holding.refill(key, found, now, complete=len(rows) < limit, past=past)
            if past:
                self._current.errands.set()
            self._alarm.plan(now)
            self._alarm.wake()
