"""Sagas from start to end, against the same three calls without a saga.

    python benchmarks/sagas.py [--count 500] [--at-once 32]

Each saga publishes a message to each of three topics by RPC steps. One process has the service and its
callers; messages and sagas are in SQLite files, and every commit waits for the disk. A caller starts a saga
and watches it until it has ended. The last line is JSON: sagas, per_s (sagas from start to end), direct_per_s
(rounds of the three calls), ratio (of the two), p50_ms and p99_ms (of a saga), cpu_ms (of the process for a
saga).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from google.protobuf import json_format

from plexus.client.channel import MeshChannel
from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc, sagas_pb2, sagas_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.resources import Topic
from services.queueing.sagas.methods import Methods
from services.queueing.sagas.orchestrator import Orchestrator
from services.queueing.sagas.requests import Channel
from services.queueing.sagas.servicer import SagaServicer
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.watching import Changes
from services.queueing.servicer import QueueingServicer
from services.queueing.state import Database
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig, TelemetryConfig
from services.runtime.pipeline import Pipeline
from services.runtime.telemetry import configure_logging

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

TOPICS = ("reserve", "charge", "ship")
DATA = b"x" * 256


async def _serve(folder: Path, stack: AsyncExitStack) -> grpc.aio.Channel:
    broker = await stack.enter_async_context(SqliteBroker(folder / "queue.sqlite"))
    for topic in TOPICS:
        await broker.create_topic(Topic(topic, log=True))
    database = await stack.enter_async_context(Database(f"sqlite:///{folder}/state.sqlite"))
    server = grpc.aio.server(
        interceptors=[Pipeline("queueing", ServerConfig(), AllowAll(), trusted_peer="cli")]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    store, changes = DatabaseSagaStore(database), Changes()
    methods = Methods(lambda _service: MeshChannel(channel))
    orchestrator = Orchestrator(store, Channel(broker), methods, changes)
    sagas = SagaServicer(store, orchestrator, changes, max_running=10_000)
    calls = await stack.enter_async_context(Calls(broker))
    queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker, calls), server)
    sagas_pb2_grpc.add_SagaServiceServicer_to_server(sagas, server)
    await server.start()
    stack.push_async_callback(server.stop, 1)
    driving = asyncio.create_task(orchestrator.run())
    stack.push_async_callback(asyncio.wait, [driving])
    stack.callback(driving.cancel)
    return channel


def _definition() -> sagas_pb2.SagaDefinition:
    messages = [{"data": "${input.data}", "attributes": {"saga": "${saga.id}"}}]
    steps = [
        {
            "name": topic,
            "action": {
                "rpc": {"method": "queueing/Publish", "request": {"topic": topic, "messages": messages}}
            },
        }
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


async def measure(count: int, at_once: int, folder: Path) -> dict[str, float]:
    """The calls first, then the sagas."""
    async with AsyncExitStack() as stack:
        channel = await _serve(folder, stack)
        queueing = queueing_pb2_grpc.QueueingServiceStub(channel)
        sagas = sagas_pb2_grpc.SagaServiceStub(channel)
        await sagas.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=_definition()))

        async def direct(number: int) -> None:
            message = queueing_pb2.Message(data=DATA, attributes={"saga": str(number)})
            for topic in TOPICS:
                await queueing.Publish(queueing_pb2.PublishRequest(topic=topic, messages=[message]))

        async def saga(number: int) -> None:
            request = {"definition": "order", "id": f"s{number}", "input": {"data": DATA.decode()}}
            await sagas.StartSaga(json_format.ParseDict(request, sagas_pb2.StartSagaRequest()))
            state = None
            async for answer in sagas.WatchSaga(sagas_pb2.WatchSagaRequest(saga=f"s{number}")):
                state = answer.event.state if answer.HasField("event") else state
            assert state == sagas_pb2.SAGA_STATE_SUCCEEDED, state

        await _rounds(at_once, at_once, direct)  # warm
        began = time.perf_counter()
        await _rounds(count, at_once, direct)
        directly = count / (time.perf_counter() - began)
        began, cpu = time.perf_counter(), time.process_time()
        took = await _rounds(count, at_once, saga)
        per_s, cpu = count / (time.perf_counter() - began), time.process_time() - cpu
    return {
        "sagas": count,
        "per_s": round(per_s, 1),
        "direct_per_s": round(directly, 1),
        "ratio": round(per_s / directly, 3),
        "p50_ms": round(took[count // 2] * 1000),
        "p99_ms": round(took[count * 99 // 100] * 1000),
        "cpu_ms": round(cpu / count * 1000, 2),
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="sagas")
    parser.add_argument("--at-once", type=int, default=32, help="that are running")
    given = parser.parse_args()
    configure_logging("bench", TelemetryConfig(log_level="error"))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(measure(given.count, given.at_once, Path(folder)))))


if __name__ == "__main__":
    main()
