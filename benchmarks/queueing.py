"""Queueing: publish and consume through Plexus over gRPC, on both backends, against the bare library beneath.

The service is a process of its own; RabbitMQ is one node on this machine. Messages are persistent and every
publish waits for its confirmation, bare ones too. Bare SQLite inserts as many bytes, in as large
transactions, with the same fsync. Bare and Plexus take turns, Celery and Plexus too, and a ratio is the
median of the turns'. What is equal between Celery and Plexus is said in broker/tasks.py.

The last line is one JSON object, of the first size, with that of each further size under its number:
publish_ratio and consume_ratio (Plexus on RabbitMQ over bare aio-pika with 256 publishes in flight,
consuming with a prefetch of 100; bars 0.7), celery_ratio (tasks a second from the first sent until the last
has run, over Celery; bar 3), celery_unconfirmed_ratio (over Celery as it is by default, which does not ask
the broker whether it has the message), celery_queued_ratio (tasks that were all sent before: worker over
worker), sqlite_batch_per_s (bar 10,000), sqlite_ratio (over bare SQLite), p50_ms and p99_ms (end to end on
RabbitMQ at a fixed rate), load (of the machine, one minute's, at the end).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.broker.bare import BATCH, IN_FLIGHT, bare_rabbit, bare_sqlite, in_flight, rate
from benchmarks.broker.tasks import Rates, celery_tasks, plexus_tasks
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
from tests.servers.programs import RABBITMQ
from tests.servers.queueing import QueueingServer
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


RATE_PER_S = 200
ROUNDS = 3


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


class Turns:
    """Bare and Plexus in turns, on one backend and size."""

    def __init__(self, name: str, size: int) -> None:
        """Nothing is measured yet."""
        self._name = name
        self._size = size
        self._rounds: list[dict[str, float]] = []

    async def take(self, way: Plexus, count: int, bare: dict[str, float]) -> None:
        """One turn of Plexus after one of the bare library."""
        alone = max(count // 10, 10)
        found = {
            "one by one": await way.publish(alone, 1),
            "256 in flight": await way.publish(count, IN_FLIGHT),
            "batches of 100": await way.publish(count, 4, BATCH),
            "stream": await way.stream(count, BATCH),
        }
        found["consume"] = await way.consume(alone + count + 2 * (count // BATCH * BATCH))
        self._rounds.append(found | bare)

    def report(self) -> None:
        """Print the medians."""
        for what in self._rounds[0]:
            self.tell(what, statistics.median(entry[what] for entry in self._rounds))

    def tell(self, what: str, value: float) -> None:
        """Print a line."""
        print(f"{self._name:<10}{self._size:>7} B  {what:<22}{value:>10.1f}", flush=True)

    def best(self) -> float:
        """The better of batches and stream."""
        return statistics.median(_best(entry) for entry in self._rounds)

    def ratio(self, what: str, bare: str) -> float:
        """The median of a turn's quotients; `best` is the better of batches and stream."""
        quotients = [(_best(r) if what == "best" else r[what]) / r[bare] for r in self._rounds]
        return round(statistics.median(quotients), 3)


def _best(entry: dict[str, float]) -> float:
    return max(entry["batches of 100"], entry["stream"])


async def on_rabbit(url: str, folder: Path, count: int, size: int) -> dict[str, float]:
    """Plexus on RabbitMQ and aio-pika."""
    turns = Turns("rabbitmq", size)
    await asyncio.to_thread(folder.mkdir)
    with QueueingServer(folder, url) as server:
        async with server.channel() as channel:
            way = Plexus(QueueingServiceStub(channel), size)
            await way.prepare()
            for _ in range(ROUNDS):
                publishing, consuming = await bare_rabbit(url, count, size)
                bare = {"aio-pika 256 in flight": publishing, "aio-pika consume": consuming}
                await turns.take(way, count, bare)
            times = await way.latencies(min(count, 1000))
    turns.report()
    p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    turns.tell("p50 ms", p50)
    turns.tell("p99 ms", p99)
    return {
        "publish_ratio": turns.ratio("best", "aio-pika 256 in flight"),
        "consume_ratio": turns.ratio("consume", "aio-pika consume"),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
    }


async def on_sqlite(folder: Path, count: int, size: int) -> dict[str, float]:
    """Plexus on SQLite and SQLite."""
    turns = Turns("sqlite", size)
    await asyncio.to_thread(folder.mkdir)
    with QueueingServer(folder) as server:
        async with server.channel() as channel:
            way = Plexus(QueueingServiceStub(channel), size)
            await way.prepare()
            for number in range(ROUNDS):
                bare = await asyncio.to_thread(bare_sqlite, folder / f"bare-{number}.sqlite", count, size)
                await turns.take(way, count, {"SQLite in batches": bare})
    turns.report()
    return {
        "sqlite_batch_per_s": round(turns.best()),
        "sqlite_ratio": turns.ratio("best", "SQLite in batches"),
    }


async def measure(server: RabbitServer, folder: Path, count: int, size: int) -> dict[str, float]:
    """Messages of one size on both backends."""
    with server.vhost() as vhost:
        rabbit = await on_rabbit(server.url(vhost), folder / f"rabbit-{size}", count, size)
    return rabbit | await on_sqlite(folder / f"sqlite-{size}", count, size)


def tasks(server: RabbitServer, folder: Path, count: int, size: int, turns: int) -> dict[str, float]:
    """Celery's workers and Plexus's, in turns."""
    folder.mkdir()
    rounds: list[dict[str, Rates]] = []
    with server.vhost() as vhost, QueueingServer(folder, server.url(vhost)) as served:
        target = f"127.0.0.1:{served.port}"
        for number in range(turns):
            found: dict[str, Rates] = {}
            for name, confirm in (("celery", True), ("celery-default", False)):
                with server.vhost() as own:
                    file = folder / f"{name}-{number}"
                    found[name] = celery_tasks(server.url(own), file, count, size, confirm=confirm)
            found["plexus"] = plexus_tasks(target, folder / f"plexus-{number}", count, size)
            rounds.append(found)
    for name in rounds[0]:
        for what in ("together", "queued"):
            rate_ = statistics.median(getattr(found[name], what) for found in rounds)
            print(f"{name:<16}{size:>7} B  tasks {what:<16}{rate_:>10.1f}", flush=True)

    def ratio(what: str, other: str = "celery") -> float:
        quotients = [getattr(found["plexus"], what) / getattr(found[other], what) for found in rounds]
        return float(round(statistics.median(quotients), 2))

    return {
        "celery_ratio": ratio("together"),
        "celery_unconfirmed_ratio": ratio("together", "celery-default"),
        "celery_queued_ratio": ratio("queued"),
    }


def main() -> None:
    """Start RabbitMQ, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=20_000, help="of each way, in all turns")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 16_384])
    parser.add_argument("--turns", type=int, default=ROUNDS, help="of Celery and Plexus")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plexus-bench-"))
    try:
        (folder / "rabbitmq").mkdir()
        with RabbitServer(RABBITMQ.provide(), folder / "rabbitmq") as server:
            count = max(options.messages // ROUNDS, IN_FLIGHT)
            by_size: dict[int, dict[str, float]] = {}
            for size in options.sizes:
                by_size[size] = asyncio.run(measure(server, folder, count, size))
                by_size[size] |= tasks(
                    server, folder / f"tasks-{size}", max(count // 2, IN_FLIGHT), size, options.turns
                )
                by_size[size]["load"] = round(os.getloadavg()[0], 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first, *others = options.sizes
    print(json.dumps(by_size[first] | {str(size): by_size[size] for size in others}))


if __name__ == "__main__":
    main()
