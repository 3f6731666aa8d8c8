"""Tasks and messages from programs that have no event loop: scripts, and views of Django or Flask.

    from plexus.client import blocking
    from shop import invoice

    handle = invoice.blocking.delay(17)
    print(handle.result(timeout_s=60))
    blocking.publish("orders", b"order 17")

Any thread may call. One thread of the process has the loop and the connection, from the first call on; it
ends with the process, or by `close`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from plexus.client.portal import PROCESS, BlockingError
from plexus.client.publisher import Publisher

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator

    from plexus.client.portal import Connect, Portal
    from plexus.client.results import Handle
    from plexus.client.tasks import Task
    from plexus.queueing.v1 import queueing_pb2 as pb

__all__ = ["BlockingError", "BlockingHandle", "BlockingTask", "close", "connect_by", "publish", "publish_all"]

P = ParamSpec("P")
R = TypeVar("R")
ResultT = TypeVar("ResultT")

_SEND_S = 150.0
"""Longer than a queue is tried to be made, and a task to be published: those say more."""
_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True)
class BlockingHandle(Generic[R]):
    """A task on its way; its result comes to this process."""

    call_id: str
    _handle: Handle[R]
    _portal: Portal

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        return self._handle.done

    def result(self, *, timeout_s: float) -> R:
        """Wait for the result, for so many seconds; it may be asked for again.

        Raises:
            TimeoutError: It did not come in time.
            TaskFailedError: The task was given up.
            BlockingError: Called in a running event loop, or `close` was called.
        """
        return self._call(self._handle.result(timeout_s=timeout_s), timeout_s)

    def progress(self, *, timeout_s: float) -> Iterator[Any]:
        """What the task reports, as it comes, until it ends; each report is given once.

        Args:
            timeout_s: Longest wait for the next report, or the end.

        Raises:
            TimeoutError: Nothing came in time.
            BlockingError: As `result`.
        """
        reports = self._handle.progress()
        nothing = object()

        async def following() -> Any:
            return await anext(reports, nothing)

        while (report := self._call(following(), timeout_s, margin_s=0)) is not nothing:
            yield report

    def _call(
        self, work: Coroutine[Any, Any, ResultT], timeout_s: float, *, margin_s: float = _MARGIN_S
    ) -> ResultT:
        try:
            portal = PROCESS.portal()
            if portal is not self._portal:
                raise BlockingError("plexus.client.blocking was closed since, and the handle with it")
        except BaseException:
            work.close()
            raise
        return portal.call(work, timeout_s + margin_s)


@dataclass(frozen=True, slots=True)
class BlockingTask(Generic[P, R]):
    """A task, sent by threads that wait."""

    task: Task[P, R, Any]

    def send(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Send it to the workers and want no result; returns the message's id, once it is durable.

        Raises:
            TypeError: The arguments do not fit the signature, or are no JSON.
            PublishError: It could not be sent.
            BlockingError: Called in a running event loop.
            NotJoinedError: There is no mesh.
            grpc.RpcError: Its queue could not be made.
        """
        data = self.task.arguments.dump(args, kwargs)
        portal = PROCESS.portal()
        return portal.call(portal.sender.send(self.task, data), _SEND_S)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> BlockingHandle[R]:
        """Send it to the workers; its result comes to the handle. Raises as `send` does."""
        data = self.task.arguments.dump(args, kwargs)
        portal = PROCESS.portal()
        handle = portal.call(portal.sender.delay(self.task, data), _SEND_S)
        return BlockingHandle(handle.call_id, handle, portal)

    def find(self, call_id: str, *, timeout_s: float) -> R:
        """Wait for a result that any process asked for; see `Task.find`."""
        portal = PROCESS.portal()
        found = portal.sender.find(self.task, call_id, timeout_s=timeout_s)
        return portal.call(found, timeout_s + _MARGIN_S)


def publish(topic: str, message: pb.Message | bytes, *, timeout_s: float = 60.0) -> str:
    """Publish a message and wait until it is durable.

    Args:
        topic: Its name.
        message: The message, or its content alone.
        timeout_s: How long it is tried.

    Returns:
        The message's id.

    Raises:
        PublishError: It was refused, or the time is over.
        BlockingError: Called in a running event loop.
        NotJoinedError: There is no mesh.
    """
    return publish_all(topic, [message], timeout_s=timeout_s)[0]


def publish_all(topic: str, messages: Iterable[pb.Message | bytes], *, timeout_s: float = 60.0) -> list[str]:
    """Publish messages, many at once, and wait until all are durable; see `publish`.

    Returns:
        Their ids, in order. When one fails, the others may have been published.
    """
    portal = PROCESS.portal()

    async def work() -> list[str]:
        async with Publisher(portal.stub, topic, deadline_s=timeout_s) as publisher:
            sent = [await publisher.send(message) for message in messages]
            await publisher.flush()
            failures = [each.exception() for each in sent]
            for failure in failures:
                if failure is not None:
                    raise failure
            return [each.result() for each in sent]

    return portal.call(work(), timeout_s + _SEND_S)


def connect_by(connecting: Connect | None) -> None:
    """Connect in another way than to the mesh of the environment, from the next call on.

    Args:
        connecting: Gives a context with a QueueingService stub, made within the loop. None: as before.
    """
    PROCESS.use(connecting)


def close() -> None:
    """Settle what was sent, disconnect, and end the thread; the next call begins anew."""
    PROCESS.close()
