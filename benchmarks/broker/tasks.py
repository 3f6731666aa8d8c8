"""The same trivial task, sent and run with Celery and with Plexus's tasks: what is equal, and what is not.

Equal: the broker, with a virtual host for each; persistent messages, publishes confirmed by the broker; one
process that sends to one that works; arguments as JSON; acknowledged when the task has run; no results; as
many messages ahead of the worker. That is CONCURRENCY, with which Celery is faster than with its default of
4. Celery's worker has no pool, which is its fastest for tasks that do nothing; it sends no events and is
not told of other workers. Each is used as its documentation does: Celery's `apply_async` waits for each
confirmation, Plexus's `send` is awaited for many at once. Celery is also measured as it is by default,
without confirmations: what the broker loses then nobody is told of.

Not equal: Plexus has its service between, a process more. Its queues are quorum queues, Celery's are
classic ones, its default. It stores what it sends again once, and takes it from the broker once.

A task writes one byte to a file, whose size then says how many have run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery

from plexus.client import TaskApp, Worker
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
from tests.servers.queueing import channel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PROJECT = Path(__file__).resolve().parents[2]
CONCURRENCY = 100
BOUND_S = 600.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Tasks a second.

    Attributes:
        together: From the first that is sent until the last has run.
        queued: Of those that were all sent before the worker began.
    """

    together: float
    queued: float


def _celery(url: str, file: Path, *, confirm: bool = True) -> tuple[Celery, Any]:
    app = Celery("bench", broker=url)
    app.conf.update(
        broker_transport_options={"confirm_publish": confirm},
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=CONCURRENCY,
        worker_hijack_root_logger=False,
        task_default_queue=file.name,
    )
    ran = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @app.task(name="bench.run")  # type: ignore[untyped-decorator]
    def run(data: str) -> None:
        os.write(ran, data[:1].encode())

    return app, run


def _plexus(file: Path) -> tuple[TaskApp, Any]:
    app = TaskApp(file.name)
    ran = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @app.task()
    async def run(data: str) -> None:
        os.write(ran, data[:1].encode())

    return app, run


@contextmanager
def _worker(kind: str, target: str, file: Path) -> Iterator[None]:
    """A worker that has run a first task."""
    command = [sys.executable, "-m", "benchmarks.broker.tasks", kind, target, str(file)]
    process = subprocess.Popen(  # noqa: S603 - our own
        command, cwd=_PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(file, 1)
        yield
    finally:
        process.kill()
        process.wait()


def _wait(file: Path, count: int) -> None:
    """Wait until so many tasks have run.

    Raises:
        TimeoutError: They have not.
    """
    deadline = time.monotonic() + BOUND_S
    while not file.exists() or file.stat().st_size < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} tasks did not run")
        time.sleep(0.005)


def _rates(kind: str, target: str, file: Path, count: int, send: Callable[[Path, int], None]) -> Rates:
    """Both rates, each with a queue and a file of its own: a killed worker leaves what it has not told."""
    together, queued = file.with_suffix(".together"), file.with_suffix(".queued")
    send(together, 1)
    with _worker(kind, target, together):
        began = time.perf_counter()
        send(together, count)
        _wait(together, 1 + count)
        first = count / (time.perf_counter() - began)
    send(queued, 1 + count)
    with _worker(kind, target, queued):
        began, before = time.perf_counter(), queued.stat().st_size
        _wait(queued, 1 + count)
        # The first ones may all be in one batch.
        return Rates(first, max(1, 1 + count - before) / (time.perf_counter() - began))


def celery_tasks(url: str, file: Path, count: int, size: int, *, confirm: bool = True) -> Rates:
    """Celery's rates; files and queues have this file's name."""
    data = "x" * size

    def send(queue: Path, number: int) -> None:
        app, task = _celery(url, queue, confirm=confirm)
        with app.connection_for_write() as connection:
            producer = app.amqp.Producer(connection)
            for _ in range(number):
                task.apply_async((data,), producer=producer)
        app.close()

    return _rates("celery", url, file, count, send)


def plexus_tasks(target: str, file: Path, count: int, size: int) -> Rates:
    """Plexus's rates; files and queues have this file's name."""
    data = "x" * size
    with asyncio.Runner() as runner:
        return _rates(
            "plexus",
            target,
            file,
            count,
            lambda queue, number: runner.run(_send(target, queue, data, number)),
        )


async def _send(target: str, file: Path, data: str, count: int) -> None:
    app, task = _plexus(file)
    async with channel(target) as opened, app.open(QueueingServiceStub(opened)):
        await asyncio.gather(*(task.send(data) for _ in range(count)))


async def _work(target: str, file: Path) -> None:
    app, _ = _plexus(file)
    async with channel(target) as opened:
        await Worker(app, QueueingServiceStub(opened), concurrency=CONCURRENCY).run()


def main() -> None:
    """Work until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["celery", "plexus"])
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.kind == "celery":
        app, _ = _celery(options.target, options.file)
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=error")
        app.worker_main(["worker", "--pool=solo", *quiet])
    else:
        asyncio.run(_work(options.target, options.file))


if __name__ == "__main__":
    main()
