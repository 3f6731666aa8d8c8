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
    from collections.abc import Iterator

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
    )
    ran = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @app.task(name="bench.run")  # type: ignore[untyped-decorator]
    def run(data: str) -> None:
        os.write(ran, data[:1].encode())

    return app, run


def _plexus(file: Path) -> tuple[TaskApp, Any]:
    app = TaskApp("bench")
    ran = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @app.task()
    async def run(data: str) -> None:
        os.write(ran, data[:1].encode())

    return app, run


@contextmanager
def _worker(kind: str, target: str, file: Path, count: int) -> Iterator[None]:
    """A worker, when so many tasks have run."""
    command = [sys.executable, "-m", "benchmarks.broker.tasks", kind, target, str(file)]
    process = subprocess.Popen(  # noqa: S603 - our own
        command, cwd=_PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(file, count)
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


def celery_tasks(url: str, file: Path, count: int, size: int, *, confirm: bool = True) -> Rates:
    """Celery's rates, with a file of its own."""
    app, task = _celery(url, file, confirm=confirm)
    data = "x" * size
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)

        def send(number: int) -> None:
            for _ in range(number):
                task.apply_async((data,), producer=producer)

        send(1)
        with _worker("celery", url, file, 1):
            began = time.perf_counter()
            send(count)
            _wait(file, 1 + count)
            together = count / (time.perf_counter() - began)
        send(count + 1)
        queued = _drained("celery", url, file, count)
    app.close()
    return Rates(together, queued)


def plexus_tasks(target: str, file: Path, count: int, size: int) -> Rates:
    """Plexus's rates, with a file of its own."""
    data = "x" * size
    with asyncio.Runner() as runner:
        runner.run(_send(target, file, data, 1))
        with _worker("plexus", target, file, 1):
            began = time.perf_counter()
            runner.run(_send(target, file, data, count))
            _wait(file, 1 + count)
            together = count / (time.perf_counter() - began)
        runner.run(_send(target, file, data, count + 1))
    return Rates(together, _drained("plexus", target, file, count))


def _drained(kind: str, target: str, file: Path, count: int) -> float:
    """The rate of what was sent before, from when the worker has run the first of it."""
    with _worker(kind, target, file, 2 + count):
        began, before = time.perf_counter(), file.stat().st_size
        _wait(file, 2 + 2 * count)
        return (2 + 2 * count - before) / (time.perf_counter() - began)


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
