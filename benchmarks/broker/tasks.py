"""The same trivial task as a worker process of its own: for Celery, and for Plexus's subscriber.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery

from plexus.client import Publisher, Subscriber
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
from tests.servers.queueing import channel

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROJECT = Path(__file__).resolve().parents[2]
CONCURRENCY = 100
BOUND_S = 600.0


def _celery(url: str, file: Path) -> tuple[Celery, Any]:
    """The application and its task: acknowledged when done, no results, publishes confirmed."""
    app = Celery("bench", broker=url)
    app.conf.update(
        broker_transport_options={"confirm_publish": True},
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


@contextmanager
def _worker(kind: str, target: str, file: Path, count: int) -> Iterator[None]:
    """A worker that has run a first task."""
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


def celery_tasks(url: str, file: Path, count: int, size: int) -> tuple[float, float]:
    """Tasks a second from the first sent until the last has run, and of those that were all queued before."""
    app, task = _celery(url, file)
    data = "x" * size
    task.delay(data)
    with _worker("celery", url, file, 1), app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        began = time.perf_counter()
        for _ in range(count):
            task.apply_async((data,), producer=producer)
        _wait(file, 1 + count)
        together = count / (time.perf_counter() - began)
    for _ in range(count + 1):
        task.delay(data)
    with _worker("celery", url, file, 2 + count):
        began, before = time.perf_counter(), file.stat().st_size
        _wait(file, 2 + 2 * count)
        queued = (2 + 2 * count - before) / (time.perf_counter() - began)
    app.close()
    return together, queued


def plexus_tasks(target: str, file: Path, count: int, size: int) -> tuple[float, float]:
    """The same with Plexus's publisher and subscriber."""
    data = b"x" * size
    with asyncio.Runner() as runner:
        runner.run(_prepare(target))
        runner.run(_send(target, data, 1))
        with _worker("plexus", target, file, 1):
            began = time.perf_counter()
            runner.run(_send(target, data, count))
            _wait(file, 1 + count)
            together = count / (time.perf_counter() - began)
        runner.run(_send(target, data, count + 1))
        with _worker("plexus", target, file, 2 + count):
            began, before = time.perf_counter(), file.stat().st_size
            _wait(file, 2 + 2 * count)
            queued = (2 + 2 * count - before) / (time.perf_counter() - began)
    return together, queued


async def _prepare(target: str) -> None:
    async with channel(target) as opened:
        stub = QueueingServiceStub(opened)
        await stub.CreateTopic(pb.CreateTopicRequest(topic="tasks"))
        subscription = pb.Subscription(name="tasks", topic="tasks")
        await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))


async def _send(target: str, data: bytes, count: int) -> None:
    async with channel(target) as opened, Publisher(QueueingServiceStub(opened), "tasks") as publisher:
        await asyncio.gather(*(publisher.publish(data) for _ in range(count)))


async def _subscribe(target: str, file: Path) -> None:
    ran = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def run(delivery: pb.Delivery) -> None:
        os.write(ran, delivery.data[:1])

    async with channel(target) as opened:
        await Subscriber(QueueingServiceStub(opened), "tasks", run, concurrency=CONCURRENCY).run()


def main() -> None:
    """Work until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["celery", "plexus"])
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.kind == "celery":
        app, _ = _celery(options.target, options.file)
        # One process without a pool is Celery's fastest for tasks that do nothing.
        app.worker_main(["worker", "--pool=solo", "--without-gossip", "--without-mingle", "--loglevel=error"])
    else:
        asyncio.run(_subscribe(options.target, options.file))


if __name__ == "__main__":
    main()
