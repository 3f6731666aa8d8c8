"""One event loop in a thread of its own, with a connection, for threads that have no loop.

There is one in a process, from its first use on. It does not outlive a fork: gRPC's threads do not exist in
the child, where it may crash or wait for ever, even if all channels were closed before. So a process whose
parent has used it is refused; one that begins after its fork, as the workers of a server do, has its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import threading
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from plexus.client.join import connect
from plexus.client.sending import Sender
from plexus.queueing.v1 import queueing_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    Connect = Callable[[], AbstractAsyncContextManager[queueing_pb2_grpc.QueueingServiceStub]]

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_CLOSED = "plexus.client.blocking was closed meanwhile"
_OPEN_S = 60.0
_CLOSE_S = 30.0


class BlockingError(RuntimeError):
    """A call that blocks was made where it must not be: in an event loop, or in a fork of a caller."""


@asynccontextmanager
async def _mesh() -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
    async with connect() as mesh:
        yield mesh.stub(queueing_pb2_grpc.QueueingServiceStub)


class Portal:
    """The loop and its connection. Calls come from any thread but the loop's."""

    def __init__(self, connecting: Connect) -> None:
        """Connect.

        Raises:
            NotJoinedError: There is no mesh.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="plexus-client", daemon=True)
        self._stack = AsyncExitStack()
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._gate = threading.Lock()
        self._closed = False
        self._thread.start()
        try:
            self.sender, self.stub = self.call(self._open(connecting), _OPEN_S)
        except BaseException:
            self._end()
            raise

    async def _open(self, connecting: Connect) -> tuple[Sender, queueing_pb2_grpc.QueueingServiceStub]:
        stub = await self._stack.enter_async_context(connecting())
        return await self._stack.enter_async_context(Sender(stub)), stub

    def call(self, work: Coroutine[Any, Any, ResultT], timeout_s: float) -> ResultT:
        """Do work in the loop, and wait for it.

        Raises:
            TimeoutError: It takes longer than `timeout_s`; it was cancelled.
            BlockingError: The portal is closed, or was meanwhile.
        """
        with self._gate:
            if self._closed:
                work.close()
                raise BlockingError(_CLOSED)
            done = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._calls.add(done)
        try:
            return done.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise BlockingError(_CLOSED) from None
        finally:
            done.cancel()  # whoever waited is gone: by a deadline, or an interrupt
            self._calls.discard(done)

    def close(self) -> None:
        """Disconnect and end; calls in progress fail."""
        with self._gate:
            self._closed = True
            for done in list(self._calls):
                done.cancel()
            closed = asyncio.run_coroutine_threadsafe(self._stack.aclose(), self._loop)
        try:
            closed.result(_CLOSE_S)
        except Exception as error:  # noqa: BLE001 - nothing more can be done
            log.warning("plexus.client.blocking did not close in order: %r", error)
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()


class _Process:
    """What a process has of it: at most one portal."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._portal: Portal | None = None
        self._connecting: Connect = _mesh
        self._parents: Portal | None = None
        self._used = False
        self._orphaned = False

    def use(self, connecting: Connect | None) -> None:
        """Connect in another way from now on."""
        with self._lock:
            self.close()
            self._connecting = connecting or _mesh

    def portal(self) -> Portal:
        """The portal, opened at the first call.

        Raises:
            BlockingError: Nobody may wait here.
            NotJoinedError: There is no mesh.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise BlockingError(
                "this thread runs an event loop, which a call that blocks would stop: "
                "use the asynchronous call, within `async with app.open()`"
            )
        with self._lock:
            if self._orphaned:
                raise BlockingError(
                    "this process was forked from one that had made blocking calls, and gRPC does not "
                    "survive that: make the first call after the fork, or start it by other means than fork"
                )
            if self._portal is None:
                if not self._used:
                    self._used = True
                    os.register_at_fork(after_in_child=self._in_child)
                    atexit.register(self.close)
                self._portal = Portal(self._connecting)
            return self._portal

    def close(self) -> None:
        """Close the portal, if there is one; the next call opens another."""
        with self._lock:
            portal, self._portal = self._portal, None
            if portal is not None:
                portal.close()

    def _in_child(self) -> None:
        self._lock = threading.RLock()  # somebody may have had the other one
        self._orphaned = True
        # Kept, since gRPC's objects cannot be destroyed here either, and never used.
        self._parents, self._portal = self._portal, None


PROCESS = _Process()
"""That of this process."""
