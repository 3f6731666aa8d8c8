"""Tasks and messages from threads that have no event loop, over a real service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import plexus.client
from plexus.client import blocking
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from tests.client.preforked import WAIT_S, connect_to
from tests.servers.queueing import QueueingServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(400)

app = plexus.client.TaskApp("doubling")


@app.task()
async def double(number: int) -> int:
    """Report and give twice the number."""
    if number < 0:
        raise plexus.client.TaskError("too small", reason="TOO_SMALL")
    plexus.client.progress({"begun": number})
    return 2 * number


@app.task(queue="nobody")
async def never() -> None:
    """Run by no worker."""


class _Working:
    """A worker in a loop and thread of its own, until the end."""

    def __init__(self, server: QueueingServer) -> None:
        self._server = server
        self._end: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    async def _work(self) -> None:
        end = asyncio.Event()
        self._end = asyncio.get_running_loop(), end
        async with self._server.channel() as channel:
            worker = plexus.client.Worker(
                app, queueing_pb2_grpc.QueueingServiceStub(channel), queues=("doubling",)
            )
            running = asyncio.create_task(worker.run())
            self._begun.set()
            await end.wait()
            worker.drain()
            await running

    def __enter__(self) -> None:
        self._thread.start()
        assert self._begun.wait(WAIT_S)

    def __exit__(self, *_: object) -> None:
        assert self._end is not None
        loop, end = self._end
        loop.call_soon_threadsafe(end.set)
        self._thread.join()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a service with a worker, to which blocking calls go."""
    with QueueingServer(tmp_path_factory.mktemp("queueing")) as server, _Working(server):
        connect_to(server.port)
        try:
            yield server.port
        finally:
            blocking.connect_by(None)


@pytest.mark.usefixtures("port")
def test_many_threads_send_tasks_and_wait_for_progress_and_results() -> None:
    def ask(number: int) -> tuple[list[object], int]:
        handle = double.blocking.delay(number)
        reports = list(handle.progress(timeout_s=WAIT_S))
        return reports, handle.result(timeout_s=WAIT_S)

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(ask, range(50)))
    assert found == [([{"begun": number}], 2 * number) for number in range(50)]
    assert sum(thread.name == "plexus-client" for thread in threading.enumerate()) == 1
    assert double.blocking.send(4)
    handle = double.blocking.delay(-1)
    with pytest.raises(plexus.client.TaskFailedError) as failed:
        handle.result(timeout_s=WAIT_S)
    assert failed.value.reason == "TOO_SMALL"
    assert handle.done
    with pytest.raises(TypeError):
        double.blocking.delay("four")  # type: ignore[arg-type]


@pytest.mark.usefixtures("port")
def test_what_is_published_is_durable_and_what_is_refused_is_said() -> None:
    never.blocking.send()  # makes its queue
    assert blocking.publish("nobody", b"one")
    ids = blocking.publish_all("nobody", [pb.Message(data=b"two"), *[b"more"] * 2000])
    assert len(set(ids)) == 2001
    with pytest.raises(plexus.client.PublishError) as refused:
        blocking.publish("nowhere", b"one", timeout_s=WAIT_S)
    assert refused.value.problem is not None
    assert refused.value.problem.reason == "TOPIC_NOT_FOUND"


@pytest.mark.usefixtures("port")
def test_a_wait_has_an_end_and_closing_ends_it() -> None:
    handle = never.blocking.delay()
    with pytest.raises(TimeoutError):
        handle.result(timeout_s=0.01)
    with pytest.raises(TimeoutError):
        next(handle.progress(timeout_s=0.01))
    assert not handle.done
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(handle.result, timeout_s=WAIT_S)
        while not waiting.running():
            threading.Event().wait(0.01)
        blocking.close()
        with pytest.raises(plexus.client.BlockingError, match="closed"):
            waiting.result(WAIT_S)
    with pytest.raises(plexus.client.BlockingError, match="closed"):
        handle.result(timeout_s=WAIT_S)
    assert double.blocking.delay(2).result(timeout_s=WAIT_S) == 4  # a new one


@pytest.mark.usefixtures("port")
def test_within_a_running_loop_it_is_refused_with_the_remedy() -> None:
    handle = never.blocking.delay()

    async def misuse() -> None:
        for call in (
            lambda: double.blocking.delay(1),
            lambda: double.blocking.send(1),
            lambda: handle.result(timeout_s=1),
            lambda: blocking.publish("nobody", b"one"),
        ):
            with pytest.raises(plexus.client.BlockingError, match="asynchronous"):
                call()
        assert await asyncio.to_thread(lambda: double.blocking.delay(3).result(timeout_s=WAIT_S)) == 6

    asyncio.run(misuse())


def test_forks_have_their_own_unless_their_parent_has_used_it(port: int) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.client.preforked", str(port)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    first, second, elsewhere, parent, late, again = found.stdout.splitlines()
    assert (first, second, elsewhere, parent, again) == ("2", "4", "14", "6", "10")
    assert late.startswith("BlockingError: this process was forked from")
