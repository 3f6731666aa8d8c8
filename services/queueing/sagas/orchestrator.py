"""Drives sagas: does what is due, hears the answers, takes over from replicas that died.

What waits to be written is written together, whoever brings it, in one transaction after the other. With it
goes who does what the saga asks for then: whoever wrote it, so that nothing is read again before it is done.
The change is durable before what it asks for is done, and an answer before it is acknowledged: so nothing is
lost, and what is repeated has the call id that it had.
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
from services.queueing.sagas.contract import Change
from services.queueing.sagas.domain import Kind
from services.queueing.sagas.machine import Sent
from services.queueing.sagas.requests import answer_in
from services.queueing.sagas.writer import Writer
from services.runtime.errors import NotFoundError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.queueing.domain import Delivery
    from services.queueing.sagas.contract import Made, Order, SagaStore
    from services.queueing.sagas.domain import Record, Saga
    from services.queueing.sagas.machine import Event
    from services.queueing.sagas.methods import Methods
    from services.queueing.sagas.requests import Channel
    from services.queueing.sagas.watching import Changes

log = structlog.get_logger(__name__)

_RETRY_S = 1.0
_CLOSE_S = 5.0
_HOUSE_S = 10.0
_PAGE = 500
_BATCH = 200
_PATIENCE_S = 1.0
"""How long it is not written that a request was sent: its answer makes that needless. Until then its saga is
held, and should we die the request is sent again under its id."""


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
        self._held: dict[str, tuple[int, str]] = {}
        self._writer = Writer(store, self._owner, self._pace.lease_s, self._room, self._made)
        self._outgoing: asyncio.Queue[Made] = asyncio.Queue()
        self._done: asyncio.Queue[Delivery] = asyncio.Queue(_PAGE)
        self._calls: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._looks_at = 0.0
        self._opened = self._full = False
        self._parts = {name: _Part(name) for name in ("turns", "requests", "replies")}

    async def start(self, order: Order) -> Saga:
        """Start a saga, or find the one that the same request started.

        Raises:
            PlexusError: As the store's `write`.
        """
        return (await self._writer.submit(order)).saga

    async def change(self, saga_id: str, event: Event) -> Saga:
        """Apply an event and have what it asks for done.

        Raises:
            PlexusError: As the store's `write`.
        """
        return (await self._writer.submit(Change(saga_id, event))).saga

    async def run(self) -> None:
        """Drive until cancelled; then what is under way is left to others at once."""
        loops: tuple[Callable[[], Awaitable[None]], ...] = (
            self._writer.run,
            self._drive,
            self._send,
            self._receive,
            self._acknowledge,
            self._renew,
            self._look,
            self._keep_house,
        )
        try:
            async with asyncio.TaskGroup() as group:
                for loop in loops:
                    group.create_task(self._for_ever(loop), name=f"sagas-{loop.__name__.strip('_')}")
        finally:
            await self._stop()

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat work; while a dependency is away try again."""
        part = _Part(work.__name__.strip("_"))
        while True:
            try:
                await work()
                part.works()
            except PlexusError as error:
                part.waits(error)
                await asyncio.sleep(_soon())

    async def _stop(self) -> None:
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls, timeout=_CLOSE_S)
        with suppress(PlexusError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._store.release_all(self._owner)

    # What is due.

    def _room(self) -> int:
        return self._pace.concurrency - len(self._held) + self._writer.patient

    def _made(self, made: Made) -> None:
        """Tell what a write did, and have done what it asks for, if this replica has the saga."""
        saga = made.saga
        for record in made.records:
            _observe(saga, record)
        if made.records:
            self._changes.tell(saga.id, made.records)
        if made.held:
            self._hold(made)
            return
        self._let_go(saga.id)
        if saga.due is not None and saga.due < self._looks_at:
            self._woken.set()

    def _hold(self, made: Made) -> None:
        saga, attempt = made.saga, made.saga.attempt
        if attempt is None:
            return
        revision, call_id = self._held.get(saga.id, (0, ""))
        if saga.revision < revision or attempt.call_id == call_id:
            return  # it is being done
        self._held[saga.id] = (saga.revision, attempt.call_id)
        if saga.action_of(made.definition).method:
            call = asyncio.create_task(self._call(made))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        else:
            self._outgoing.put_nowait(made)

    def _let_go(self, saga_id: str, call_id: str = "") -> None:
        """Care no more for a saga, or for a call of it if that is what is being done."""
        held = self._held.get(saga_id)
        if held is None or (call_id and held[1] != call_id):
            return
        del self._held[saga_id]
        if self._full:
            self._woken.set()

    async def _drive(self) -> None:
        self._woken.clear()
        if not self._opened:
            await self._channel.open()
            self._opened = True
        pause_s = self._pace.poll_s
        self._looks_at = time.time() + pause_s
        self._full = self._room() <= 0
        if not self._full:
            pause_s = await self._store.next_due_s(most=self._pace.poll_s)
            if not pause_s:
                if await self._writer.claim():
                    return
                pause_s = min(self._pace.poll_s, 0.05)  # another replica is faster
        self._looks_at = time.time() + pause_s
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._woken.wait()

    async def _call(self, made: Made) -> None:
        """Do an attempt that is a call; on failure the saga's lease runs out, and somebody tries again."""
        saga = made.saga
        call_id = saga.attempt.call_id if saga.attempt else ""
        try:
            event = await self._methods.call(saga, saga.action_of(made.definition))
            await self._writer.submit(Change(saga.id, event))
            self._parts["turns"].works()
        except NotFoundError:
            pass
        except PlexusError as error:
            self._parts["turns"].waits(error)
        except Exception:  # one saga must not stop the others; its lease runs out before it is tried again
            log.exception("saga_turn_failed", saga=saga.id)
        finally:
            self._let_go(saga.id, call_id)

    async def _send(self) -> None:
        """Send what waits, all of it together."""
        batch = [await self._outgoing.get()]
        while len(batch) < _BATCH and not self._outgoing.empty():
            batch.append(self._outgoing.get_nowait())
        answers = await self._channel.send([(made.saga, made.definition) for made in batch])
        failed: list[Made] = []
        for made, answer in zip(batch, answers, strict=True):
            if isinstance(answer, PlexusError):
                self._parts["requests"].waits(answer)
                failed.append(made)
                continue
            self._parts["requests"].works()
            if made.saga.attempt is not None:
                self._write_later(made, answer or Sent(made.saga.attempt.call_id))
        if self._full:
            self._woken.set()
        if failed:
            await self._give_back(failed)

    def _write_later(self, made: Made, event: Event) -> None:
        """Write what came of sending; that it was sent can wait, since the answer may come soon."""
        timeout_s = made.saga.action_of(made.definition).timeout_s
        patience_s = min(_PATIENCE_S, timeout_s / 20) if isinstance(event, Sent) else 0.0
        future = self._writer.submit(Change(made.saga.id, event), patience_s=patience_s)
        call_id = made.saga.attempt.call_id if made.saga.attempt else ""

        def written(future: asyncio.Future[Made]) -> None:
            if not future.cancelled() and future.exception() is not None:
                self._let_go(made.saga.id, call_id)  # its lease runs out, and it is sent again

        future.add_done_callback(written)

    async def _give_back(self, failed: Sequence[Made]) -> None:
        """Leave what cannot be sent now to anybody, after a while."""
        ids = [made.saga.id for made in failed]
        try:
            await self._store.release(ids, self._owner, retry_s=_soon())
        finally:
            for saga_id in ids:
                self._let_go(saga_id)

    async def _renew(self) -> None:
        await asyncio.sleep(self._pace.lease_s / 3)
        held = list(self._held)
        for first in range(0, len(held), _PAGE):
            some = held[first : first + _PAGE]
            await self._store.renew(self._owner, some, lease_s=self._pace.lease_s)

    # What is answered.

    async def _receive(self) -> None:
        """Write answers into their sagas; they are acknowledged when that is durable."""
        deliveries = await self._channel.receive()
        taken = [(delivery, self._take(delivery)) for delivery in deliveries]
        if pending := [future for _, future in taken if future is not None]:
            await asyncio.wait(pending)
        later = []
        for delivery, future in taken:
            if future is None or self._is_written(delivery, future):
                await self._done.put(delivery)
            else:
                later.append(delivery)
        if later:
            await self._channel.give_back(later)
            await asyncio.sleep(_soon())

    def _take(self, delivery: Delivery) -> asyncio.Future[Made] | None:
        """Have an answer written; None if there is nothing to write."""
        found = answer_in(delivery)
        return None if found is None else self._writer.submit(Change(*found))

    def _is_written(self, delivery: Delivery, future: asyncio.Future[Made]) -> bool:
        """Whether an answer is done with; else it must come again."""
        error = future.exception()
        if error is None:
            self._parts["replies"].works()
        elif isinstance(error, NotFoundError):
            log.warning("saga_reply_for_nobody", message_id=delivery.message.message_id)
        elif isinstance(error, PlexusError):
            self._parts["replies"].waits(error)
            return False
        else:
            return False
        return True

    async def _acknowledge(self) -> None:
        """Be done with what is written, beside what is received meanwhile."""
        batch = [await self._done.get()]
        while len(batch) < _BATCH and not self._done.empty():
            batch.append(self._done.get_nowait())
        await self._channel.done(batch)

    # What others did.

    async def _look(self) -> None:
        """Have watchers read again of sagas that other replicas have changed."""
        await asyncio.sleep(self._pace.poll_s)
        if self._changes.stopping.is_set():
            self._changes.wake_all()
        watched = self._changes.watched()
        for first in range(0, len(watched), _PAGE):
            some = watched[first : first + _PAGE]
            self._changes.compare(some, await self._store.revisions(some))

    # Housekeeping.

    async def _keep_house(self) -> None:
        await self._channel.open()  # somebody may have deleted it
        counts = await self._store.counts()
        for state in metrics.STATES:
            metrics.SAGAS.labels(state.value).set(counts.get(state, 0))
        before = time.time() - self._pace.retention_s
        while await self._store.purge(ended_before=before, limit=_PAGE) == _PAGE:
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
    elif record.kind not in {Kind.STARTED, Kind.ATTEMPT_STARTED}:
        facts = {"saga": saga.id, "definition": saga.definition, "state": record.state.value}
        if record.problem.code:
            facts |= {"step": record.step, "code": record.problem.code}
        tell = log.error if record.kind is Kind.STUCK else log.info
        tell(f"saga_{record.kind.value}", **facts)
        if record.state.ended:
            metrics.ENDED.labels(record.state.value).inc()
