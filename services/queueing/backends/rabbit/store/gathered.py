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
        self._waiting: deque[tuple[Sequence[Job], asyncio.Future[Sequence[Result]]]] = deque()
        self._count = 0
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

    async def submit(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """Wait until jobs are durable; a caller that goes away leaves them to be written all the same.

        The jobs of a call are written together, and have one future: one for each cost more than the writing.

        Raises:
            ResourceExhaustedError: Too many wait.
            UnavailableError: The service is stopping, or the database cannot be reached.
        """
        if self._closed:
            raise UnavailableError("the service is stopping", reason="STOPPING")
        if self._count + len(jobs) > self._bound:
            raise ResourceExhaustedError("too many writes wait", reason="WRITE_QUEUE_FULL", retry_after_s=1)
        if not jobs:
            return []
        done: asyncio.Future[Sequence[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((jobs, done))
        self._count += len(jobs)
        self._wake.set()
        return await done

    async def _run(self) -> None:
        while self._waiting or not self._closed:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            group = self._group()
            try:
                results = await self._write([job for jobs, _ in group for job in jobs])
            except Exception as error:  # noqa: BLE001 - told to every caller
                for _, done in group:
                    if not done.done():
                        done.set_exception(error)
                continue
            start = 0
            for jobs, done in group:
                if not done.done():
                    done.set_result(results[start : start + len(jobs)])
                start += len(jobs)

    def _group(self) -> list[tuple[Sequence[Job], asyncio.Future[Sequence[Result]]]]:
        """What is written next: the first that waits, and those after it that fit."""
        group = [self._waiting.popleft()]
        size = len(group[0][0])
        while self._waiting and size + len(self._waiting[0][0]) <= _MAX_GROUP:
            group.append(self._waiting.popleft())
            size += len(group[-1][0])
        self._count -= size
        return group
