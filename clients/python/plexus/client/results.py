"""Results of tasks: the channel on which they come, and the handle that a caller waits on."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from weakref import WeakValueDictionary

import grpc
import grpc.aio
from pydantic_core import from_json

from plexus.client.failures import problem
from plexus.client.replies import (
    ALIVE,
    CALL_ID,
    CODE,
    ERROR,
    PREFIX,
    PROGRESS,
    REASON,
    REPLY,
    REPLY_TO,
    RESULT,
)
from plexus.client.retrying import pause_s, persist
from plexus.client.subscriber import Subscriber
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import TracebackType

    from pydantic import TypeAdapter

    from plexus.queueing.v1 import queueing_pb2_grpc

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

MAX_UNREAD = 1000
"""Progress kept for who does not read it; the oldest is dropped."""
_BEAT_S = 60.0
_CONCURRENCY = 256
_CLOSE_S = 5.0
_PATIENCE_S = 60.0


@contextmanager
def present() -> Iterator[None]:
    """What is made within may be there already."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise


class TaskFailedError(Exception):
    """A task was given up.

    Attributes:
        code: gRPC status code.
        reason: UPPER_SNAKE constant for programs; empty if the task gave none.
    """

    def __init__(self, text: str, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(text)
        self.code = code
        self.reason = reason


class Handle(Generic[ResultT]):
    """A task on its way; its result comes here while its app is open."""

    def __init__(self, call_id: str, adapter: TypeAdapter[ResultT]) -> None:
        self.call_id = call_id
        self._adapter = adapter
        self._unread: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._final: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._final.add_done_callback(lambda final: final.cancelled() or final.exception())

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        return self._final.done()

    async def result(self, *, timeout_s: float) -> ResultT:
        """Wait for the result, for so many seconds; it may be asked for again.

        Raises:
            TimeoutError: It did not come in time.
            TaskFailedError: The task was given up.
        """
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._final)

    async def progress(self) -> AsyncIterator[Any]:
        """What the task reports, as it comes, until it ends; each report is given once."""
        while (data := await self._unread.get()) is not None:
            yield from_json(data)
        self._unread.put_nowait(None)

    def take(self, attributes: dict[str, str], data: bytes) -> None:
        """A reply has come."""
        kind = attributes.get(REPLY)
        if self._final.done():
            return
        if kind == PROGRESS:
            if self._unread.qsize() >= MAX_UNREAD:
                self._unread.get_nowait()
            self._unread.put_nowait(data)
        elif kind == RESULT:
            try:
                self._final.set_result(self._adapter.validate_json(data))
            except ValueError as error:
                self.fail(TaskFailedError(f"unreadable result: {error}", grpc.StatusCode.DATA_LOSS, ""))
            self._unread.put_nowait(None)
        elif kind == ERROR:
            code = grpc.StatusCode.__members__.get(attributes.get(CODE, ""), grpc.StatusCode.UNKNOWN)
            text = data.decode(errors="replace")
            self.fail(TaskFailedError(text, code, attributes.get(REASON, "")))

    def fail(self, error: Exception) -> None:
        """No result will come."""
        if not self._final.done():
            self._final.set_exception(error)
            self._unread.put_nowait(None)


class ReplyChannel:
    """A topic and a subscription for the replies to this process; use it with `async with`.

    They are made at the first request and deleted at the end. Those of a process that was killed are deleted
    by the service, some time after it has last said that it is there.
    """

    def __init__(self, stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
        self._stub = stub
        self._name = f"{PREFIX}{uuid.uuid4().hex}"
        self._handles: WeakValueDictionary[str, Handle[Any]] = WeakValueDictionary()
        self._opening = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and delete what was made if the service answers."""
        if not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(grpc.aio.AioRpcError):
            subscription = pb.DeleteSubscriptionRequest(subscription=self._name)
            await self._stub.DeleteSubscription(subscription, timeout=_CLOSE_S)
            await self._stub.DeleteTopic(pb.DeleteTopicRequest(topic=self._name), timeout=_CLOSE_S)

    async def expect(self, handle: Handle[Any]) -> dict[str, str]:
        """Be ready for the replies to a request.

        Returns:
            The request's attributes.

        Raises:
            grpc.RpcError: The channel could not be made.
        """
        async with self._opening:
            if not self._tasks:
                await persist(self._make, within_s=_PATIENCE_S)
                for work in (self._receive(), self._beat()):
                    self._tasks.append(asyncio.create_task(work))
        self._handles[handle.call_id] = handle
        return {REPLY_TO: self._name, CALL_ID: handle.call_id}

    async def _make(self) -> None:
        settings = pb.Topic(labels={ALIVE: str(int(time.time()))})
        with present():
            await self._stub.CreateTopic(pb.CreateTopicRequest(topic=self._name, settings=settings))
        subscription = pb.Subscription(name=self._name, topic=self._name, ordered=True)
        await self._stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))

    async def _receive(self) -> None:
        failures = 0
        while True:
            try:
                await Subscriber(self._stub, self._name, self._take, concurrency=_CONCURRENCY).run()
            except grpc.aio.AioRpcError as error:  # somebody deleted it
                failures += 1
                log.warning("results cannot be received: %s", problem(error).message)
                await asyncio.sleep(pause_s(failures))
                with suppress(grpc.aio.AioRpcError):
                    await self._make()

    async def _take(self, delivery: pb.Delivery) -> None:
        handle = self._handles.get(delivery.attributes.get(CALL_ID, ""))
        if handle is not None:
            handle.take(dict(delivery.attributes), delivery.data)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            topic = pb.Topic(name=self._name, labels={ALIVE: str(int(time.time()))})
            request = pb.UpdateTopicRequest(topic=topic)
            request.update_mask.paths.append("labels")
            with suppress(grpc.aio.AioRpcError):
                await self._stub.UpdateTopic(request)
