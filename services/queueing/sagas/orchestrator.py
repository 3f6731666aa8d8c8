"""Drives sagas: does what is due, hears the answers, takes over from replicas that died.

A saga is changed by one transaction an event, whoever brings it; what a change asks for is done by whoever
holds the saga's lease, which ends with the turn or with its holder. The change is durable before what it asks
for is done, and an answer before it is acknowledged: so nothing is lost, and what is repeated has the call id
that it had.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from services.queueing.sagas import metrics
from services.queueing.sagas.domain import Kind
from services.queueing.sagas.machine import Sent, Tick
from services.queueing.sagas.requests import answer_in
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.queueing.domain import Delivery
    from services.queueing.sagas.definitions import Definition
    from services.queueing.sagas.domain import Record, Saga, SagaStore
    from services.queueing.sagas.machine import Event, Transition
    from services.queueing.sagas.methods import Methods
    from services.queueing.sagas.requests import Channel
    from services.queueing.sagas.watching import Changes

log = structlog.get_logger(__name__)

_RETRY_S = 1.0
_CLOSE_S = 5.0
_HOUSE_S = 10.0
_PURGED = 500
_GIVEN_BACK_S = 0.001


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds of an orchestrator.

    Attributes:
        lease_s: How long a saga is left to a replica that has fallen silent.
        poll_s: How long it may take to see what another replica changed.
        concurrency: Sagas that are driven at once.
        retention_s: How long a saga is kept after its end.
    """

    lease_s: float = 15.0
    poll_s: float = 1.0
    concurrency: int = 64
    retention_s: float = 7 * 24 * 3600.0


class _Part:
    """Says once that something waits for a dependency, and once that it goes on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waits = False

    def waits(self, error: PlexusError) -> None:
        if not self._waits:
            log.warning("sagas_wait", part=self._name, reason=error.reason, **error.metadata)
        self._waits = True

    def works(self) -> None:
        if self._waits:
            log.info("sagas_go_on", part=self._name)
        self._waits = False


class Orchestrator:
    """One replica's part in driving the sagas of a store."""

    def __init__(
        self, store: SagaStore, channel: Channel, methods: Methods, changes: Changes, pace: Pace | None = None
    ) -> None:
        self._store = store
        self._channel = channel
        self._methods = methods
        self._changes = changes
        self._pace = pace or Pace()
        self._owner = secrets.token_hex(8)
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._opened = False
        self._turning, self._sending, self._hearing = _Part("turns"), _Part("requests"), _Part("replies")

    def wake(self) -> None:
        """Look at once whether something is due."""
        self._woken.set()

    async def change(self, saga_id: str, event: Event) -> Saga:
        """Apply an event and have what it asks for done.

        Raises:
            PlexusError: As the store's `change`.
        """
        made = await self._store.change(saga_id, event)
        self._tell(made)
        if made.saga.due == 0.0:
            self.wake()
        return made.saga

    def _tell(self, made: Transition) -> None:
        for record in made.records:
            _observe(made.saga, record)
        if made.records:
            self._changes.tell(made.saga.id)

    async def run(self) -> None:
        """Drive until cancelled; then what is under way is left to others at once."""
        loops: tuple[Callable[[], Awaitable[None]], ...] = (
            self._drive,
            self._receive,
            self._renew,
            self._keep_house,
        )
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(self._for_ever(loop), name=f"sagas-{loop.__name__.strip('_')}")

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat work; while a dependency is away try again."""
        part = _Part(work.__name__.strip("_"))
        try:
            while True:
                try:
                    await work()
                    part.works()
                except PlexusError as error:
                    part.waits(error)
                    await asyncio.sleep(_soon())
        finally:
            if work == self._drive:
                await self._stop_turns()

    # What is due.

    async def _drive(self) -> None:
        self._woken.clear()
        if not self._opened:
            await self._channel.open()
            self._opened = True
        room = self._pace.concurrency - len(self._turns)
        pause_s = self._pace.poll_s
        if room:
            pause_s = await self._store.next_due_s(most=self._pace.poll_s)
            if not pause_s:
                claimed = await self._store.claim(self._owner, limit=room, lease_s=self._pace.lease_s)
                for saga_id in claimed:
                    if saga_id not in self._turns:  # else our own lease had run out, and is ours again
                        self._turns[saga_id] = asyncio.create_task(self._turn(saga_id))
                if claimed:
                    return
                pause_s = min(self._pace.poll_s, 0.05)  # another replica is faster
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._woken.wait()

    async def _turn(self, saga_id: str) -> None:
        """Do what a saga asks for until it waits; on failure its lease runs out, and somebody tries again."""
        try:
            held = True
            while held:
                event = await self._do(*await self._store.work(saga_id))
                if event is None:
                    await self._store.release(saga_id, self._owner, retry_s=_soon())
                    return
                made, held = await self._store.drive(saga_id, self._owner, event)
                self._tell(made)
            self._turning.works()
        except asyncio.CancelledError:
            with suppress(PlexusError):
                await self._store.release(saga_id, self._owner, retry_s=_GIVEN_BACK_S)
            raise
        except NotFoundError:
            pass
        except PlexusError as error:
            self._turning.waits(error)
        except Exception:  # one saga must not stop the others; its lease runs out before it is tried again
            log.exception("saga_turn_failed", saga=saga_id)
        finally:
            del self._turns[saga_id]
            self.wake()

    async def _do(self, saga: Saga, definition: Definition) -> Event | None:
        """Do what is due, and tell what came of it; None if it cannot be done now."""
        attempt = saga.attempt
        if attempt is None or attempt.deadline:
            return Tick()
        action = saga.action_of(definition)
        if action.method:
            return await self._methods.call(saga, action)
        try:
            refused = await self._channel.send(saga, attempt, action)
        except PlexusError as error:
            self._sending.waits(error)
            return None
        self._sending.works()
        return refused or Sent(attempt.call_id)

    async def _stop_turns(self) -> None:
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        if turns:
            await asyncio.wait(turns, timeout=_CLOSE_S)

    async def _renew(self) -> None:
        await asyncio.sleep(self._pace.lease_s / 3)
        if self._turns:
            await self._store.renew(self._owner, list(self._turns), lease_s=self._pace.lease_s)

    # What is answered.

    async def _receive(self) -> None:
        deliveries = await self._channel.receive()
        written = await asyncio.gather(*(self._take(delivery) for delivery in deliveries))
        pairs = list(zip(deliveries, written, strict=True))
        if done := [delivery for delivery, taken in pairs if taken]:
            await self._channel.done(done)
        if later := [delivery for delivery, taken in pairs if not taken]:
            await self._channel.give_back(later)
            await asyncio.sleep(_soon())

    async def _take(self, delivery: Delivery) -> bool:
        """Write an answer into its saga; False if that cannot be done now."""
        found = answer_in(delivery)
        if found is None:
            return True
        saga_id, event = found
        try:
            await self.change(saga_id, event)
        except NotFoundError:
            log.warning("saga_reply_for_nobody", saga=saga_id)
        except PlexusError as error:
            self._hearing.waits(error)
            return False
        self._hearing.works()
        return True

    # Housekeeping.

    async def _keep_house(self) -> None:
        await self._channel.open()  # somebody may have deleted it
        counts = await self._store.counts()
        for state in metrics.STATES:
            metrics.SAGAS.labels(state.value).set(counts.get(state, 0))
        before = time.time() - self._pace.retention_s
        while await self._store.purge(ended_before=before, limit=_PURGED) == _PURGED:
            pass
        await asyncio.sleep(_HOUSE_S)


def _soon() -> float:
    """Seconds until something is tried again."""
    return _RETRY_S * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load only


def _observe(saga: Saga, record: Record) -> None:
    outcome = metrics.OUTCOMES.get(record.kind)
    if outcome is not None:
        phase = "compensation" if record.undo else "action"
        metrics.STEPS.labels(phase, outcome).observe(record.took_s)
    elif record.kind is Kind.LATE_REPLY:
        metrics.LATE.inc()
    elif record.kind is not Kind.ATTEMPT_STARTED:
        facts = {"saga": saga.id, "definition": saga.definition, "state": record.state.value}
        if record.problem.code:
            facts |= {"step": record.step, "code": record.problem.code}
        tell = log.error if record.kind is Kind.STUCK else log.info
        tell(f"saga_{record.kind.value}", **facts)
        if record.state.ended:
            metrics.ENDED.labels(record.state.value).inc()
