"""What becomes of messages that were handed out: finished, tried again, deferred, given up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from services.queueing.domain import MAX_HISTORY, MAX_REASON
from services.queueing.metrics import GIVEN_UP, LEASES_EXPIRED
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from services.queueing.backends.rabbit.alarm import Alarm
    from services.queueing.backends.rabbit.held import Held
    from services.queueing.backends.rabbit.session import Current, Session, Settling
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Refusal

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

LEASE_EXPIRED = "lease expired"
TTL_EXPIRED = "expired"
_RETRY_S = 0.2


class Settlement:
    """Settles what a window's session holds."""

    def __init__(self, current: Current, settling: Settling, alarm: Alarm) -> None:
        self._current = current
        self._settling = settling
        self._alarm = alarm
        self._works: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Finish what was begun."""
        await asyncio.gather(*self._works, return_exceptions=True)

    async def _whole(self, work: Coroutine[None, None, Result]) -> Result:
        """Do it to its end, even if the caller goes away: half of it would be one delivery too many."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return await asyncio.shield(task)

    async def _all(self, works: Sequence[Coroutine[None, None, None]]) -> None:
        """Do all of it, one after the other, and then raise the first failure."""

        async def each() -> None:
            failure: PlexusError | None = None
            for work in works:
                try:
                    await work
                except PlexusError as error:
                    failure = failure or error
            if failure is not None:
                raise failure

        if works:
            await self._whole(each())

    # What consumers say.

    async def acknowledge(self, tokens: Sequence[str]) -> list[str]:
        """Be done with messages; returns the ids whose lease had ended."""
        return await self._whole(self._acknowledge(tokens))

    async def _acknowledge(self, tokens: Sequence[str]) -> list[str]:
        session, now = self._current.session, time.time()
        taken = [(token, session.holding.take(token, now)) for token in tokens]
        entries = [held for _, held in taken if held is not None]
        try:
            told = await self._finish(session, entries)
        except PlexusError:
            until = time.time() + self._current.subscription.ack_deadline_s
            for token, held in taken:
                if held is not None:
                    session.holding.lend(token, held, until)
            self._alarm.plan(until)
            raise
        # A delivery that the state knows to be over is over, whatever the broker has heard.
        return [
            token for token, held in taken if held is None or not (told or held.carried.once or held.position)
        ]

    async def nack(self, refusals: Sequence[Refusal]) -> list[str]:
        """Take messages back; returns the ids whose lease had ended."""
        session, expired = self._current.session, []
        work = []
        for refusal in refusals:
            held = session.holding.take(refusal.ack_id, time.time())
            if held is None:
                expired.append(refusal.ack_id)
                continue
            reason = refusal.reason[:MAX_REASON] or "not acknowledged"
            work.append(self._fail(session, held, reason, pause_s=refusal.delay_s, dead=refusal.dead))
        await self._all(work)
        return expired

    def extend(self, leases: Sequence[tuple[str, float]]) -> list[str]:
        """Set when leases end, in seconds from now; returns the ids whose lease had ended."""
        holding, expired = self._current.session.holding, []
        now = time.time()
        for token, seconds in leases:
            held = holding.take(token, now)
            if held is None:
                expired.append(token)
            elif seconds > 0:
                holding.lend(token, held, now + seconds)
                self._alarm.plan(now + seconds)
            else:
                holding.make_ready(held, now)
                self._alarm.wake()
        if holding.busy:
            self._current.errands.set()
        return expired

    # What time says.

    async def settle(self) -> None:
        """Do what the time asks for: end leases, bring back what waited, give up what waited too long.

        Raises:
            UnavailableError: The state cannot be reached; what was not done is done at the next call.
        """
        session, now = self._current.session, time.time()
        if session.holding.wake(now):
            self._alarm.wake()
        if session.holding.busy:
            self._current.errands.set()
        work = [self._fail(session, held, LEASE_EXPIRED, pause_s=0.0) for held in session.holding.ended(now)]
        work += [self._fail(session, held, TTL_EXPIRED, dead=True) for held in session.holding.outlived(now)]
        await self._all(work)

    # What is done.

    async def _fail(
        self, session: Session, held: Held, reason: str, *, pause_s: float | None = None, dead: bool = False
    ) -> None:
        """Note a failed attempt; the message comes again or is given up.

        Raises:
            PlexusError: The state cannot be reached; the message is as it was, and out again soon.
        """
        subscription, carried, now = self._current.subscription, held.carried, time.time()
        if reason == LEASE_EXPIRED:
            LEASES_EXPIRED.add(subscription.name)
        policy = carried.retry or subscription.retry
        attempts = carried.attempts + (reason != TTL_EXPIRED)
        history = [*carried.history, (now, reason)][-MAX_HISTORY:]
        failed = replace(carried, attempts=attempts, history=history)
        gone = dead or attempts >= policy.max_attempts
        pause = policy.pause_s(attempts) if pause_s is None else pause_s
        in_place = pause == 0 or (subscription.ordered and carried.stored.ordering_key)
        if in_place and not gone:
            held.carried, held.not_before = failed, now + pause
            self._return(session, held)
            return
        try:
            if gone:
                await self._bury(held, failed, reason)
                GIVEN_UP.add(subscription.name)
            else:
                await self._settling.defer(subscription, failed, now + pause)
        except PlexusError:
            held.not_before = now + _RETRY_S
            self._return(session, held)
            raise
        while True:
            try:
                await self._finish(session, [held])
            except PlexusError as error:
                log.warning("message_stuck", subscription=subscription.name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                if session.alive:
                    continue
            return

    async def _bury(self, held: Held, failed: Carried, reason: str) -> None:
        subscription = self._current.subscription
        if held.thin:
            (kept,) = await self._settling.recall(subscription, [held.as_arrived()])
            if kept is None:
                return  # it is over
            failed = replace(failed, stored=kept.stored)
        await self._settling.bury(subscription, failed, reason)

    def _return(self, session: Session, held: Held) -> None:
        session.holding.make_ready(held, time.time())
        if session.holding.busy:
            self._current.errands.set()
        self._alarm.plan(held.not_before)
        self._alarm.wake()

    async def _finish(self, session: Session, entries: Sequence[Held]) -> bool:
        """Be done with messages; whether the broker has been told.

        Raises:
            PlexusError: The state cannot be reached.
        """
        subscription = self._current.subscription
        once = [held.as_arrived() for held in entries if held.carried.once and not held.position]
        if once:
            await self._settling.finish(subscription, once)
        parked = [held.as_arrived() for held in entries if held.position]
        if parked:
            await self._settling.unpark(subscription, parked)
        told = await session.tell(entries)
        now = time.time()
        freed = [held for held in entries if session.holding.release(held, now)]
        if session.holding.busy:
            self._current.errands.set()
        if freed:
            self._alarm.plan(now)
            self._alarm.wake()
        return told
