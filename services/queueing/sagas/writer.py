"""Group commit: what waits while a transaction is under way is written by the next one, together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from services.queueing.sagas.contract import Change, Lease
from services.queueing.sagas.machine import Failed, Sent, Succeeded
from services.runtime.errors import PlexusError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.queueing.sagas.contract import Made, Order, SagaStore

log = structlog.get_logger(__name__)

MAX_WAITING = 20_000
_GROUP = 256
_LOOK_S = 0.05
"""How exactly patience is kept."""


@dataclass(slots=True)
class _Job:
    """What waits, who waits for it, and who waited for what it makes needless."""

    job: Order | Change
    future: asyncio.Future[Made]
    instead_of: asyncio.Future[Made] | None = None

    def succeed(self, made: Made) -> None:
        if not self.future.done():
            self.future.set_result(made)
        if self.instead_of is not None:
            self.instead_of.cancel()

    def fail(self, error: Exception) -> None:
        for future in (self.future, self.instead_of):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: not everybody waits


class Writer:
    """Writes the sagas of one replica, one transaction after the other, and tells what was made of each.

    What comes of a transaction is told before the next one begins, so in the order in which it was stored.
    """

    def __init__(
        self,
        store: SagaStore,
        owner: str,
        lease_s: float,
        room: Callable[[], int],
        made: Callable[[Made], None],
    ) -> None:
        """Set it up.

        Args:
            store: Where they are kept.
            owner: Who holds what it takes.
            lease_s: For how long.
            room: How many more it may take now.
            made: Told of each saga that was written or claimed.
        """
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._room = room
        self._made = made
        self._waiting: deque[_Job] = deque()
        self._patient: dict[str, tuple[float, _Job]] = {}
        self._news = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._ended = False

    @property
    def patient(self) -> int:
        """How many sagas have a job that can wait."""
        return len(self._patient)

    def submit(self, job: Order | Change, *, patience_s: float = 0.0) -> asyncio.Future[Made]:
        """What a job made, when it is durable.

        Args:
            job: To be written; a change that can wait is dropped, its future cancelled, if its call is
                answered meanwhile: the answer says all that it would.
            patience_s: How long it can wait.

        Raises:
            PlexusError: From the future: as `SagaStore.write`, or it cannot be written now.
        """
        future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.set_exception(_stopping())
        elif len(self._waiting) + len(self._patient) >= MAX_WAITING:
            future.set_exception(
                ResourceExhaustedError("too many changes of sagas wait", reason="TOO_MANY_WAITING")
            )
        elif isinstance(job, Change):
            self._submit_change(_Job(job, future), job, patience_s)
        else:
            self._waiting.append(_Job(job, future))
            self._news.set()
        return future

    def _submit_change(self, job: _Job, change: Change, patience_s: float) -> None:
        _, before = self._patient.pop(change.saga_id, (0.0, None))
        if before is not None:
            if _answers(change, before.job):
                job.instead_of = before.future
            else:
                self._waiting.append(before)
        if patience_s:
            self._patient[change.saga_id] = (time.monotonic() + patience_s, job)
        else:
            self._waiting.append(job)
        self._news.set()

    async def run(self) -> None:
        """Write until cancelled; then what still waits fails."""
        try:
            while True:
                self._news.clear()
                self._hurry()
                if self._waiting:
                    async with self._one_at_a_time:
                        await self._write()
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S if self._patient else None):
                        await self._news.wait()
        finally:
            self._ended = True
            for job in (*self._waiting, *(job for _, job in self._patient.values())):
                job.fail(_stopping())
            self._waiting.clear()
            self._patient.clear()

    def _hurry(self) -> None:
        """Let those wait no longer whose patience is over."""
        now = time.monotonic()
        for saga_id in [saga_id for saga_id, (until, _) in self._patient.items() if until <= now]:
            self._waiting.append(self._patient.pop(saga_id)[1])

    async def _write(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(_GROUP, len(self._waiting)))]
        results: Sequence[Made | Exception]
        try:
            results = await self._store.write([job.job for job in group], self._lease())
        except PlexusError as error:
            results = [error] * len(group)
        except asyncio.CancelledError:
            for job in group:
                job.fail(_stopping())
            raise
        except Exception as error:  # a fault of ours in one must not stop the others
            log.exception("sagas_write_failed")
            results = [error] * len(group)
        for job, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                job.fail(result)
            else:
                self._made(result)
                job.succeed(result)

    async def claim(self) -> int:
        """Take what is due, as far as there is room; how many sagas that were.

        Raises:
            PlexusError: The store cannot be reached.
        """
        async with self._one_at_a_time:
            claimed = await self._store.claim(self._lease())
            for made in claimed:
                self._made(made)
            return len(claimed)

    def _lease(self) -> Lease:
        return Lease(self._owner, self._lease_s, max(0, self._room()))


def _answers(change: Change, waiting: Order | Change) -> bool:
    """Whether a change is the answer to the call that the waiting one says was sent."""
    if not isinstance(waiting, Change) or not isinstance(waiting.event, Sent):
        return False
    return isinstance(change.event, Succeeded | Failed) and change.event.call_id == waiting.event.call_id


def _stopping() -> UnavailableError:
    return UnavailableError("the service is stopping", reason="STOPPING")
