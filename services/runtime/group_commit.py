"""Group commit: writes of concurrent callers go to one thread, which makes them durable together.

An engine's commit costs about the same for one write as for a thousand. While a group is being committed the
next one gathers, so throughput rises with the number of callers and a lone caller waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from services.runtime.errors import ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

Job = TypeVar("Job")


class GroupCommit(Generic[Job]):
    """Feeds jobs to a commit function in groups, in order, from one thread of its own.

    `async with` owns the thread; leaving commits what was taken and refuses what comes later.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Job]], Sequence[object]],
        *,
        name: str,
        max_group_size: int,
        max_waiting: int,
    ) -> None:
        """Set the bounds.

        Args:
            commit: Runs in the thread: applies the jobs, makes them durable, and returns for each, in order,
                its result or the exception that is its failure. What it raises fails the whole group.
            name: Of the thread.
            max_group_size: Jobs in one commit.
            max_waiting: Jobs that may wait; one more is refused.
        """
        self._commit = commit
        self._max_group_size = max_group_size
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[Job, asyncio.Future[Any]]] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start the loop."""
        self._loop = asyncio.create_task(self._run(), name="group-commit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit what waits, then stop."""
        self._closed = True
        self._wake.set()
        if self._loop is not None:
            await self._loop
        self._executor.shutdown(wait=True)

    async def submit(self, job: Job) -> Any:
        """Wait until a job is durable; a caller that goes away leaves it to be committed all the same.

        Returns:
            What the commit function gave for it.

        Raises:
            ResourceExhaustedError: Too many jobs wait.
            UnavailableError: The service is stopping.
            Exception: The job's own failure.
        """
        if self._closed:
            raise UnavailableError("the service is stopping", reason="STOPPING")
        if len(self._waiting) >= self._max_waiting:
            raise ResourceExhaustedError("too many writes wait", reason="WRITE_QUEUE_FULL", retry_after_s=1)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        self._wake.set()
        return await future

    async def _run(self) -> None:
        while self._waiting or not self._closed:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            count = min(len(self._waiting), self._max_group_size)
            group = [self._waiting.popleft() for _ in range(count)]
            await self._commit_group(group)

    async def _commit_group(self, group: list[tuple[Job, asyncio.Future[Any]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._executor, self._commit, [job for job, _ in group])
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - told to every caller; an engine's panic is no Exception
            failure = error if isinstance(error, Exception) else RuntimeError(f"the engine failed: {error}")
            results = [failure] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
