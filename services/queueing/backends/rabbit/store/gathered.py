"""Changes that callers bring at the same time, made in one transaction: its commit costs the same for all."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from services.runtime.errors import ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

Job = TypeVar("Job")
Result = TypeVar("Result")

_MAX_GROUP = 1000


class Gathered(Generic[Job, Result]):
    """While one group is being committed the next one gathers; open it with `async with`."""

    def __init__(
        self, write: Callable[[Sequence[Job]], Awaitable[Sequence[Result]]], *, waiting: int
    ) -> None:
        """Set the bounds.

        Args:
            write: Makes jobs durable together, and gives a result for each; what it raises fails them all.
            waiting: Jobs that may wait; one more is refused.
        """
        self._write = write
        self._bound = waiting
        self._waiting: deque[tuple[Job, asyncio.Future[Result]]] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start."""
        self._task = asyncio.create_task(self._run(), name="gathered-writes")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was taken, refuse what comes later."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def submit(self, jobs: Sequence[Job]) -> list[Result]:
        """Wait until jobs are durable; a caller that goes away leaves them to be written all the same.

        Raises:
            ResourceExhaustedError: Too many wait.
            UnavailableError: The service is stopping, or the database cannot be reached.
        """
        if self._closed:
            raise UnavailableError("the service is stopping", reason="STOPPING")
        if len(self._waiting) + len(jobs) > self._bound:
            raise ResourceExhaustedError("too many writes wait", reason="WRITE_QUEUE_FULL", retry_after_s=1)
        loop = asyncio.get_running_loop()
        entries = [(job, loop.create_future()) for job in jobs]
        self._waiting.extend(entries)
        self._wake.set()
        results = await asyncio.gather(*(future for _, future in entries), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def _run(self) -> None:
        while self._waiting or not self._closed:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_GROUP))]
            try:
                results = await self._write([job for job, _ in group])
            except Exception as error:  # noqa: BLE001 - told to every caller
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():
                    future.set_result(result)
