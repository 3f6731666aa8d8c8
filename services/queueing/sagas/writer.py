"""Group commit: what waits while a transaction is under way is written by the next one, together."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.queueing.sagas.contract import Lease
from services.runtime.errors import PlexusError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.queueing.sagas.contract import Change, Made, Order, SagaStore

log = structlog.get_logger(__name__)

MAX_WAITING = 20_000
_GROUP = 256
_PATIENCE_S = 0.05
"""How long what nobody waits for waits for company."""


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
        self._waiting: deque[tuple[Order | Change, asyncio.Future[Made]]] = deque()
        self._some, self._urgent = asyncio.Event(), asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._ended = False

    def submit(self, job: Order | Change, *, urgent: bool = True) -> asyncio.Future[Made]:
        """What a job made, when it is durable; what is not urgent may wait for other jobs.

        Raises:
            PlexusError: From the future: as `SagaStore.write`, or it cannot be written now.
        """
        future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.set_exception(_stopping())
        elif len(self._waiting) >= MAX_WAITING:
            future.set_exception(
                ResourceExhaustedError("too many changes of sagas wait", reason="TOO_MANY_WAITING")
            )
        else:
            self._waiting.append((job, future))
            self._some.set()
            if urgent:
                self._urgent.set()
        return future

    async def run(self) -> None:
        """Write until cancelled; then what still waits fails."""
        try:
            while True:
                await self._some.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_S):
                        await self._urgent.wait()
                async with self._one_at_a_time:
                    await self._write()
        finally:
            self._ended = True
            for _, future in self._waiting:
                _fail(future, _stopping())
            self._waiting.clear()

    async def _write(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(_GROUP, len(self._waiting)))]
        if not self._waiting:
            self._some.clear()
            self._urgent.clear()
        results: Sequence[Made | Exception]
        try:
            results = await self._store.write([job for job, _ in group], self._lease())
        except PlexusError as error:
            results = [error] * len(group)
        except asyncio.CancelledError:
            for _, future in group:
                _fail(future, _stopping())
            raise
        except Exception as error:  # a fault of ours in one must not stop the others
            log.exception("sagas_write_failed")
            results = [error] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                _fail(future, result)
                continue
            self._made(result)
            if not future.done():
                future.set_result(result)

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


def _fail(future: asyncio.Future[Made], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # retrieved: not everybody waits


def _stopping() -> UnavailableError:
    return UnavailableError("the service is stopping", reason="STOPPING")
