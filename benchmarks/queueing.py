"""Queueing: publish and consume through Plexus over gRPC, on both backends, against the bare library beneath.

The service is a process of its own; RabbitMQ is one node on this machine. Messages are persistent and every
publish waits for its confirmation, bare ones too. Bare SQLite inserts as many bytes, in as large
transactions, with the same fsync. All are measured in one run, one after the other.

The last line is one JSON object: publish_ratio and consume_ratio (Plexus on RabbitMQ over bare aio-pika with
256 publishes in flight, consuming with a prefetch of 100; bars 0.7), sqlite_batch_per_s (bar 10,000),
sqlite_ratio (over bare SQLite), p50_ms and p99_ms (end to end on RabbitMQ at a fixed rate).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
from tests.servers.programs import RABBITMQ
from tests.servers.queueing import QueueingServer
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


IN_FLIGHT, BATCH, PREFETCH = 256, 100, 100
RATE_PER_S = 200


async def rate(count: int, work: Awaitable[None]) -> float:
    """How many a second."""
    began = time.perf_counter()
    await work
    return count / (time.perf_counter() - began)


async def in_flight(count: int, lanes: int, one: Callable[[], Awaitable[object]]) -> None:
    """Do something so often, so many at once."""

    async def lane(number: int) -> None:
        for _ in range(number, count, lanes):
            await one()

    await asyncio.gather(*(lane(number) for number in range(lanes)))


class Plexus:
    """A topic and its subscription over gRPC."""

    def __init__(self, stub: QueueingServiceStub, size: int) -> None:
        self._stub = stub
        self._data = b"x" * size

    async def prepare(self) -> None:
        """Make them, and others for latencies."""
        for name in ("bench", "timed"):
            await self._stub.CreateTopic(pb.CreateTopicRequest(topic=name))
            subscription = pb.Subscription(name=name, topic=name)
            await self._stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))

    def _messages(self, count: int) -> list[pb.Message]:
        return [pb.Message(data=self._data)] * count

    async def publish(self, count: int, lanes: int, batch: int = 1) -> float:
        """Unary calls."""
        request = pb.PublishRequest(topic="bench", messages=self._messages(batch))
        work = in_flight(count // batch, min(lanes, count // batch), lambda: self._stub.Publish(request))
        return await rate(count, work)

    async def stream(self, count: int, batch: int) -> float:
        """One stream."""
        request = pb.StreamingPublishRequest(topic="bench", messages=self._messages(batch))

        async def run() -> None:
            requests = [request] * (count // batch)
            async for _ in self._stub.StreamingPublish(iter(requests)):
                pass

        return await rate(count, run())

    async def consume(self, count: int) -> float:
        """One stream with acknowledgements."""
        said: asyncio.Queue[pb.StreamingPullRequest] = asyncio.Queue()

        async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
            yield pb.StreamingPullRequest(subscription="bench", max_outstanding_messages=1000)
            while True:
                yield await said.get()

        async def run() -> None:
            left, call = count, self._stub.StreamingPull(requests())
            async for response in call:
                ids = [delivery.ack_id for delivery in response.deliveries]
                said.put_nowait(pb.StreamingPullRequest(acknowledge=ids))
                left -= len(ids)
                if left <= 0:
                    break
            call.cancel()

        return await rate(count, run())

    async def latencies(self, count: int) -> list[float]:
        """Milliseconds from before the publish until the consumer has it, at a fixed rate."""
        found: list[float] = []

        async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
            yield pb.StreamingPullRequest(subscription="timed", max_outstanding_messages=1000)
            while len(found) < count:
                yield await said.get()

        said: asyncio.Queue[pb.StreamingPullRequest] = asyncio.Queue()
        call = self._stub.StreamingPull(requests())

        async def consume() -> None:
            async for response in call:
                now = time.perf_counter()
                found.extend((now - float(delivery.data)) * 1000 for delivery in response.deliveries)
                ids = [delivery.ack_id for delivery in response.deliveries]
                said.put_nowait(pb.StreamingPullRequest(acknowledge=ids))
                if len(found) >= count:
                    break
            call.cancel()

        consumer = asyncio.create_task(consume())
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / RATE_PER_S - time.perf_counter()))
                message = pb.Message(data=repr(time.perf_counter()).encode())
                group.create_task(_publish(self._stub, message))
        await consumer
        return found


async def _publish(stub: QueueingServiceStub, message: pb.Message) -> None:
    await stub.Publish(pb.PublishRequest(topic="timed", messages=[message]))


async def bare_rabbit(url: str, count: int, size: int) -> tuple[float, float]:
    """Publishing and consuming a second with aio-pika alone, on a quorum queue."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("bare", durable=True, arguments={"x-queue-type": "quorum"})
        exchange = channel.default_exchange
        message = aio_pika.Message(b"x" * size, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        publishing = await rate(
            count, in_flight(count, IN_FLIGHT, lambda: exchange.publish(message, "bare", mandatory=True))
        )
        consumer = await connection.channel()
        await consumer.set_qos(prefetch_count=PREFETCH)
        queue = await consumer.get_queue("bare", ensure=False)
        left, done = count, asyncio.Event()

        async def take(incoming: aio_pika.abc.AbstractIncomingMessage) -> None:
            nonlocal left
            await incoming.ack()
            left -= 1
            if left == 0:
                done.set()

        async def run() -> None:
            await queue.consume(take)
            await done.wait()

        return publishing, await rate(count, run())


def bare_sqlite(file: Path, count: int, size: int) -> float:
    """Inserts a second in transactions of a batch, each on the disk when it is committed."""
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
    data, began = b"x" * size, time.perf_counter()
    for _ in range(count // BATCH):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO messages (data) VALUES (?)", [(data,)] * BATCH)
        db.execute("COMMIT")
    elapsed = time.perf_counter() - began
    db.close()
    return count / elapsed


async def plexus(name: str, url: str, folder: Path, count: int, size: int) -> dict[str, float]:
    """Every way through Plexus, on one backend."""
    await asyncio.to_thread(folder.mkdir)
    with QueueingServer(folder, url) as server:
        async with server.channel() as channel:
            way = Plexus(QueueingServiceStub(channel), size)
            await way.prepare()
            found = {
                "one by one": await way.publish(max(count // 10, 10), 1),
                "256 in flight": await way.publish(count, IN_FLIGHT),
                "batches of 100": await way.publish(count, 4, BATCH),
                "stream": await way.stream(count, BATCH),
            }
            published = max(count // 10, 10) + count + 2 * (count // BATCH * BATCH)
            found["consume"] = await way.consume(published)
            times = await way.latencies(min(count, 1000))
    found["p50 ms"] = statistics.median(times)
    found["p99 ms"] = statistics.quantiles(times, n=100)[98]
    for what, value in found.items():
        print(f"{name:<10}{size:>7} B  {what:<16}{value:>10.1f}", flush=True)
    return found


async def measure(server: RabbitServer, folder: Path, count: int, sizes: list[int]) -> dict[str, float]:
    """All of it; the figures are of the first size."""
    figures: dict[str, float] = {}
    for size in sizes:
        with server.vhost() as vhost:
            publishing, consuming = await bare_rabbit(server.url(vhost), count, size)
            rabbit = await plexus("rabbitmq", server.url(vhost), folder / f"rabbit-{size}", count, size)
        bare = bare_sqlite(folder / f"bare-{size}.sqlite", count, size)
        sqlite = await plexus("sqlite", "", folder / f"sqlite-{size}", count, size)
        print(f"{'aio-pika':<10}{size:>7} B  {'256 in flight':<16}{publishing:>10.1f}")
        print(f"{'aio-pika':<10}{size:>7} B  {'consume':<16}{consuming:>10.1f}")
        print(f"{'raw SQLite':<10}{size:>7} B  {'batches of 100':<16}{bare:>10.1f}", flush=True)
        best = max(rabbit["batches of 100"], rabbit["stream"])
        best_sqlite = max(sqlite["batches of 100"], sqlite["stream"])
        figures = figures or {
            "publish_ratio": round(best / publishing, 3),
            "consume_ratio": round(rabbit["consume"] / consuming, 3),
            "sqlite_batch_per_s": round(best_sqlite),
            "sqlite_ratio": round(best_sqlite / bare, 3),
            "p50_ms": round(rabbit["p50 ms"], 2),
            "p99_ms": round(rabbit["p99 ms"], 2),
        }
    return figures


def main() -> None:
    """Start RabbitMQ, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 16_384])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plexus-bench-"))
    try:
        (folder / "rabbitmq").mkdir()
        with RabbitServer(RABBITMQ.provide(), folder / "rabbitmq") as server:
            figures = asyncio.run(measure(server, folder, max(options.messages, IN_FLIGHT), options.sizes))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
