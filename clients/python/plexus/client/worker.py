"""Running the tasks of an app: arguments in, progress and results out, failures retried or given up."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from pydantic_core import to_json

from plexus.client.failures import problem
from plexus.client.kept import kept_of
from plexus.client.pace import Pace
from plexus.client.publisher import BATCH_BYTES, BATCH_MESSAGES
from plexus.client.replies import ERROR, PROGRESS, RESULT, Request, request_of
from plexus.client.retrying import persist
from plexus.client.sending import declare
from plexus.client.subscriber import DRAIN_S, RejectError, RetryLaterError, Subscriber
from plexus.client.tasks import TASK
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from plexus.client.tasks import Task, TaskApp
    from plexus.queueing.v1 import queueing_pb2_grpc

log = logging.getLogger(__name__)

MAX_REPORTS = 64
"""Progress that waits to be sent; the oldest is dropped."""
MAX_REPORT_BYTES = 64 * 1024
MAX_RESULT_BYTES = 10 * 1024 * 1024
MAX_ERROR = 4000
_REPLY_S = 60.0


class TaskError(RejectError):
    """Raised by a task as its answer: it is not tried again, and the caller gets the code and the reason."""

    def __init__(
        self, text: str, *, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION, reason: str = ""
    ) -> None:
        super().__init__(text)
        self.code = code
        self.reason = reason


def _measured(messages: list[pb.Message]) -> tuple[int, int]:
    return len(messages), sum(message.ByteSize() for message in messages)


class _Replies:
    """Publishes replies, those of a topic together: while some are on their way the next ones gather."""

    def __init__(self, stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
        self._stub = stub
        self._waiting: dict[str, deque[tuple[list[pb.Message], asyncio.Future[None]]]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def publish(self, topic: str, messages: list[pb.Message]) -> None:
        """Publish messages, again for as long as the service is away, up to a minute.

        Raises:
            grpc.RpcError: The last failure.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if topic in self._waiting:
            self._waiting[topic].append((messages, done))
        else:
            self._waiting[topic] = deque([(messages, done)])
            task = asyncio.create_task(self._send(topic))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        await done

    async def _send(self, topic: str) -> None:
        waiting = self._waiting[topic]
        while waiting:
            batch = [waiting.popleft()]
            count, size = _measured(batch[0][0])
            while waiting:
                more = _measured(waiting[0][0])
                count, size = count + more[0], size + more[1]
                if count > BATCH_MESSAGES or size > BATCH_BYTES:
                    break
                batch.append(waiting.popleft())
            if not await self._sent(topic, batch, alone=len(batch) == 1):
                for each in batch:  # one of them is at fault
                    await self._sent(topic, [each], alone=True)
        del self._waiting[topic]

    async def _sent(
        self, topic: str, batch: list[tuple[list[pb.Message], asyncio.Future[None]]], *, alone: bool
    ) -> bool:
        messages = [message for each, _ in batch for message in each]
        request = pb.PublishRequest(topic=topic, messages=messages)
        failure: Exception | None = None
        try:
            await persist(lambda: self._stub.Publish(request, timeout=_REPLY_S), within_s=_REPLY_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT and not alone:
                return False
            failure = error
        for _, done in batch:
            if done.done():  # nobody waits any more
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)
        return True


class _Run:
    """A task being run, and what goes to its caller."""

    def __init__(
        self,
        replies: _Replies,
        request: Request | None,
        delivery: pb.Delivery,
    ) -> None:
        self.attempt = delivery.attempt
        self.message_id = delivery.message_id
        self._replies = replies
        self._request = request
        self._kept = kept_of(delivery.attributes)
        self._loop = asyncio.get_running_loop()
        self._reports: deque[bytes] = deque(maxlen=MAX_REPORTS)
        self._sending: asyncio.Task[None] | None = None

    def report(self, data: bytes) -> None:
        """Send it soon; called in any thread."""
        if self._request is not None:
            self._reports.append(data)
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    def _waiting(self) -> list[pb.Message]:
        messages = []
        while self._reports and self._request is not None:
            messages.append(self._request.reply(PROGRESS, self._reports.popleft()))
        return messages

    async def _send(self) -> None:
        while messages := self._waiting():
            try:
                await self._publish(messages)
            except grpc.aio.AioRpcError as error:  # it is only progress
                log.debug("progress not sent: %s", problem(error).message)

    async def _publish(self, messages: list[pb.Message]) -> None:
        if self._request is not None:
            await self._replies.publish(self._request.reply_to, messages)

    async def _keep(self, kept: Request, final: pb.Message) -> None:
        final.dedup_id = f"{kept.call_id}.{self.attempt}"
        try:
            await self._replies.publish(kept.reply_to, [final])
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:  # somebody deleted the log
                raise

    async def end(self, kind: str, data: bytes, *, code: str = "", reason: str = "") -> None:
        """Tell the caller how it ended; a caller that is not there any more does not matter.

        Raises:
            grpc.RpcError: It could not be told in time: the message comes again.
        """
        if self._kept is not None:
            await self._keep(self._kept, self._kept.reply(kind, data, code=code, reason=reason))
        if self._request is None:
            return
        if self._sending is not None:
            await asyncio.wait([self._sending])
        final = self._request.reply(kind, data, code=code, reason=reason)
        final.dedup_id = f"{self._request.call_id}.{self.attempt}"
        messages = [*self._waiting(), final]
        try:
            await self._publish(messages)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise


_running: ContextVar[_Run | None] = ContextVar("plexus_task", default=None)


def progress(value: Any) -> None:
    """Report how far the running task is: any JSON value; from its thread too. Nothing happens elsewhere.

    Raises:
        ValueError: The value is no JSON, or has more than 64 KiB.
    """
    run = _running.get()
    if run is not None:
        data = to_json(value)
        if len(data) > MAX_REPORT_BYTES:
            raise ValueError(f"a report has at most {MAX_REPORT_BYTES} bytes")
        run.report(data)


def attempt() -> int:
    """Which attempt of its task is running, from 1; 0 outside of a worker."""
    run = _running.get()
    return 0 if run is None else run.attempt


class Worker:
    """Runs the tasks of an app; `run` it."""

    def __init__(
        self,
        app: TaskApp,
        stub: queueing_pb2_grpc.QueueingServiceStub,
        *,
        queues: tuple[str, ...] = (),
        concurrency: int = 16,
        drain_s: float = DRAIN_S,
        per_second: float = 0.0,
    ) -> None:
        """Set it up.

        Args:
            app: Whose tasks.
            stub: A QueueingService stub.
            queues: Of these queues only. Default: of all that the app's tasks have.
            concurrency: Tasks of a queue that run at once.
            drain_s: How long running tasks may go on after `drain`.
            per_second: Tasks of a queue that are begun in a second, evenly; 0 is no bound.

        Raises:
            ValueError: The app has no task in one of the queues, or the rate is negative.
        """
        if per_second < 0:
            raise ValueError("per_second is 0 for no bound, or positive")
        known = {task.queue for task in app.tasks.values()}
        for queue in queues:
            if queue not in known:
                raise ValueError(f"{app.name!r} has no task in queue {queue!r}")
        self._app = app
        self._stub = stub
        self._replies = _Replies(stub)
        self.queues = tuple(dict.fromkeys(queues)) or tuple(sorted(known))
        self._threads = ThreadPoolExecutor(concurrency * max(1, len(self.queues)), "task")
        self._paces = {queue: Pace(per_second) for queue in self.queues} if per_second else {}
        self._subscribers = [
            Subscriber(stub, queue, self._handler(queue), concurrency=concurrency, drain_s=drain_s)
            for queue in self.queues
        ]

    async def run(self) -> None:
        """Run tasks until drained, or until cancelled, which cancels them.

        Raises:
            grpc.RpcError: A queue cannot be made, or was refused.
        """
        try:
            for queue in self.queues:
                await persist(partial(declare, self._stub, queue), within_s=math.inf)
            async with asyncio.TaskGroup() as group:
                for subscriber in self._subscribers:
                    group.create_task(subscriber.run())
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Take no more tasks; `run` ends when those that run have, or gives them back after `drain_s`."""
        for subscriber in self._subscribers:
            subscriber.drain()
        for pace in self._paces.values():
            pace.stop()  # who has not begun is given back at once

    def _handler(self, queue: str) -> Callable[[pb.Delivery], Awaitable[None]]:
        pace = self._paces.get(queue)
        if pace is None:
            return self._handle

        async def in_turn(delivery: pb.Delivery) -> None:
            await pace.turn()
            await self._handle(delivery)

        return in_turn

    async def _handle(self, delivery: pb.Delivery) -> None:
        task = self._app.meant(delivery.attributes)  # if there is none, a newer worker may know it
        request = request_of(delivery.attributes)
        if request is not None and 0 < request.deadline < time.time():
            return  # nobody waits any more
        run = _Run(self._replies, request, delivery)
        _running.set(run)  # a handler has a context of its own
        try:
            if delivery.attempt > task.retries + 1:
                raise TaskError(
                    f"{delivery.attempt - 1} workers ended while they ran it", code=grpc.StatusCode.ABORTED
                )
            result = await self._run(task, delivery.data)
        except Exception as error:
            again = isinstance(error, (RetryLaterError, *task.retry_on)) and not isinstance(
                error, RejectError
            )
            if again and delivery.attempt <= task.retries:
                raise
            text = str(error) if isinstance(error, RejectError) else f"{type(error).__name__}: {error}"
            reason = getattr(error, "reason", "") if isinstance(error, TaskError) else ""
            await run.end(ERROR, text[:MAX_ERROR].encode(), code=_code(error).name, reason=reason)
            if TASK not in delivery.attributes:
                return  # the saga keeps it, and decides whether the step is tried again
            raise RejectError(text) from error
        await run.end(RESULT, result)
        log.info("%s done, attempt %d", task.name, delivery.attempt)

    async def _run(self, task: Task[Any, Any, Any], data: bytes) -> bytes:
        try:
            arguments = task.arguments.load(data)
        except ValueError as error:
            raise TaskError(str(error), code=grpc.StatusCode.INVALID_ARGUMENT) from error
        try:
            async with asyncio.timeout(task.timeout_s) as limit:
                if inspect.iscoroutinefunction(task.function):
                    result = await task.function(**arguments)
                else:
                    context = contextvars.copy_context()
                    result = await asyncio.get_running_loop().run_in_executor(
                        self._threads, lambda: context.run(task.function, **arguments)
                    )
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"took longer than {task.timeout_s:g} s") from error
            raise
        told: bytes = task.returns.dump_json(result)
        if len(told) > MAX_RESULT_BYTES:
            raise TaskError(
                f"the result has {len(told)} bytes, more than {MAX_RESULT_BYTES}",
                code=grpc.StatusCode.OUT_OF_RANGE,
                reason="RESULT_TOO_LARGE",
            )
        return told


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, TaskError):
        return error.code
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, RejectError):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code()
    return grpc.StatusCode.INTERNAL
