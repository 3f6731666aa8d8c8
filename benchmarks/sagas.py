"""Sagas from start to end: one service, one worker, one caller, each a process of its own.

    python benchmarks/sagas.py [--count 2000] [--at-once 64] [--state postgresql://…]
    uv run --with dbos==3.4.0 python benchmarks/sagas.py

A saga has three steps; each is a request to the worker and its reply, over topics. The caller starts it and
watches it until it has ended. Messages and sagas are in SQLite files, and every commit waits for the disk;
the sagas are in a PostgreSQL if one is named. Compared in the same run with

- the floor, `chain`: the same three requests and replies to the same worker, driven by the caller. Messages
  are as durable; where a chain stands is in the caller's memory and lost with it, and nothing is undone.
- `dbos`, if it is installed: DBOS Transact with SQLite, the durable workflows of a Python library, with three
  steps that do nothing. Equal: what was done is durable before the next step begins, and goes on after
  kill -9. Not equal: its steps are functions of the same process, so there is no worker, no message and no
  network; what is undone in which order is the workflow's own code.

The last line is JSON: sagas, per_s, chain_per_s, dbos_per_s (0 without it), ratio (of sagas to chains),
p50_ms and p99_ms (of a saga); for each saga cpu_ms of the service, chain_cpu_ms the same of a chain,
worker_cpu_ms, caller_cpu_ms, dbos_cpu_ms of its whole process; statements and commits of the state; load
(average of the machine before).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf import json_format

from benchmarks._processes import Processes
from benchmarks._sagas_worker import SUBSCRIPTION, TOPICS
from plexus.client import Publisher, Subscriber
from plexus.client.replies import CALL_ID, REPLY_TO, Request
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2, sagas_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from benchmarks._processes import Process

HERE = Path(__file__).parent
REPLIES = "chain.replies"
INPUT = {"order": "17", "items": ["book", "pen"], "note": "x" * 200}


def _definition() -> sagas_pb2.SagaDefinition:
    steps = [
        {"name": topic, "action": {"topic": f"work.{topic}"}, "compensation": {"topic": "work.undo"}}
        for topic in TOPICS
    ]
    return json_format.ParseDict({"name": "order", "steps": steps}, sagas_pb2.SagaDefinition())


async def _rounds(count: int, at_once: int, work: Callable[[int], Awaitable[None]]) -> list[float]:
    """Do work so often, so many at once; the seconds of each."""
    slots, took = asyncio.Semaphore(at_once), []

    async def one(number: int) -> None:
        async with slots:
            began = time.perf_counter()
            await work(number)
            took.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    return sorted(took)


class _Chains:
    """The floor: the same requests and replies, driven from here."""

    def __init__(self, stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
        self._stub = stub
        self._publishers = {topic: Publisher(stub, f"work.{topic}") for topic in TOPICS}
        self._waiting: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Work during the block."""
        await self._stub.CreateTopic(pb.CreateTopicRequest(topic=REPLIES))
        own = pb.Subscription(name=REPLIES, topic=REPLIES)
        await self._stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=own))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(Subscriber(self._stub, REPLIES, self._answered, concurrency=256))
            for publisher in self._publishers.values():
                await stack.enter_async_context(publisher)
            yield

    async def _answered(self, delivery: pb.Delivery) -> None:
        waiting = self._waiting.pop(delivery.attributes[CALL_ID], None)
        if waiting is not None:
            waiting.set_result(None)

    async def run(self, number: int) -> None:
        """One chain."""
        for topic, publisher in self._publishers.items():
            request = Request(REPLIES, f"chain-{number}-{topic}", 0.0)
            message = pb.Message(
                data=json.dumps(INPUT).encode(),
                attributes={REPLY_TO: request.reply_to, CALL_ID: request.call_id},
                dedup_id=request.call_id,
                ordering_key=str(number),
            )
            done = self._waiting[request.call_id] = asyncio.get_running_loop().create_future()
            await publisher.publish(message)
            await done


async def _prepare(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    for topic in (*TOPICS, "undo"):
        await stub.CreateTopic(pb.CreateTopicRequest(topic=f"work.{topic}"))
    worker = pb.Subscription(name=SUBSCRIPTION, topic="work.*", ordered=True)
    await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=worker))


async def _measured(
    service: Process, worker: Process, count: int, at_once: int, work: Callable[[int], Awaitable[None]]
) -> dict[str, Any]:
    """Rate, latencies, and what each round cost whom."""
    before, at_work = await service.ask("figures"), await worker.ask("figures")
    began, own = time.perf_counter(), time.process_time()
    took = await _rounds(count, at_once, work)
    seconds, own = time.perf_counter() - began, time.process_time() - own
    after, at_work_then = await service.ask("figures"), await worker.ask("figures")
    return {
        "per_s": round(count / seconds, 1),
        "p50_ms": round(took[count // 2] * 1000),
        "p99_ms": round(took[count * 99 // 100] * 1000),
        "cpu_ms": round((after["cpu_s"] - before["cpu_s"]) / count * 1000, 2),
        "worker_cpu_ms": round((at_work_then["cpu_s"] - at_work["cpu_s"]) / count * 1000, 2),
        "caller_cpu_ms": round(own / count * 1000, 2),
        "statements": round((after["statements"] - before["statements"]) / count, 2),
        "commits": round((after["commits"] - before["commits"]) / count, 2),
    }


async def measure(count: int, at_once: int, state: str, folder: Path) -> dict[str, Any]:
    """The chains first, then the sagas."""
    async with Processes(folder) as processes:
        service, said = await processes.python(
            "service", HERE / "_sagas_service.py", folder, *filter(None, [state])
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{said['port']}") as channel:
            queueing = queueing_pb2_grpc.QueueingServiceStub(channel)
            sagas = sagas_pb2_grpc.SagaServiceStub(channel)
            await _prepare(queueing)
            worker, _ = await processes.python("worker", HERE / "_sagas_worker.py", str(said["port"]))
            await sagas.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=_definition()))

            async def saga(number: int) -> None:
                request = sagas_pb2.StartSagaRequest(definition="order", id=f"s{number}")
                request.input.update(INPUT)
                await sagas.StartSaga(request)
                state = None
                async for answer in sagas.WatchSaga(
                    sagas_pb2.WatchSagaRequest(saga=f"s{number}"), timeout=120
                ):
                    state = answer.event.state if answer.HasField("event") else state
                assert state == sagas_pb2.SAGA_STATE_SUCCEEDED, state

            chains = _Chains(queueing)
            async with chains.open():
                await _rounds(at_once, at_once, lambda number: chains.run(-1 - number))  # warm
                chain = await _measured(service, worker, count, at_once, chains.run)
            await _rounds(at_once, at_once, lambda number: saga(count + number))
            found = await _measured(service, worker, count, at_once, saga)
    ratio = round(found["per_s"] / chain["per_s"], 3)
    return {
        "sagas": count,
        "chain_per_s": chain["per_s"],
        "ratio": ratio,
        "chain_cpu_ms": chain["cpu_ms"],
    } | found


async def rival(count: int, at_once: int, folder: Path) -> dict[str, Any]:
    """DBOS, in a process of its own."""
    if importlib.util.find_spec("dbos") is None:
        return {"dbos_per_s": 0, "dbos_cpu_ms": 0}
    async with Processes(folder) as processes:
        _, said = await processes.python(
            "dbos", HERE / "_sagas_dbos.py", str(folder), str(count), str(at_once)
        )
        return said


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="sagas")
    parser.add_argument("--at-once", type=int, default=64, help="that are running")
    parser.add_argument("--state", default="", help="database of the sagas")
    given = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(given.count, given.at_once, given.state, Path(folder)))
        found |= asyncio.run(rival(given.count, given.at_once, Path(folder)))
    print(json.dumps(found | {"load": load}))


if __name__ == "__main__":
    main()
