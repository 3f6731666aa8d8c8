"""A replica of the queueing service with its sagas, in a process of its own that may be told when to die."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from plexus.client.channel import MeshChannel
from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2_grpc
from services.queueing.backends.rabbit import RabbitBroker
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.sagas.contract import Change
from services.queueing.sagas.methods import Methods
from services.queueing.sagas.orchestrator import Orchestrator, Pace
from services.queueing.sagas.requests import Channel
from services.queueing.sagas.servicer import SagaServicer
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.watching import Changes
from services.queueing.servicer import QueueingServicer
from services.queueing.state import Database
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from services.queueing.domain import Broker

PRELOADED = [__name__]
LEASE_S = 0.5
READY_S = 120.0


@dataclass(frozen=True)
class Plan:
    """Where a replica has its data, and when it dies: at this one of its steps, from 1; 0 is never.

    `mesh` is the address of whatever `service/Method` steps call; empty is the replica itself.
    """

    state_url: str
    folder: Path
    rabbitmq_url: str = ""
    mesh: str = ""
    dies_at: int = 0
    lease_s: float = LEASE_S


class _Clock:
    """Counts what a replica does, and ends it as kill -9 does when its time has come."""

    def __init__(self, dies_at: int) -> None:
        self._dies_at = dies_at
        self._steps = itertools.count(1)

    async def then(self, work: Any) -> Any:
        result = await work
        self.tick()
        return result

    def tick(self) -> None:
        if next(self._steps) == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)


class _Store(DatabaseSagaStore):
    clock: _Clock

    async def write(self, jobs: Any, *args: Any) -> Any:
        if any(isinstance(job, Change) for job in jobs):
            self.clock.tick()
        return await self.clock.then(super().write(jobs, *args))


class _Channel(Channel):
    clock: _Clock

    async def send(self, *args: Any) -> Any:
        self.clock.tick()
        return await self.clock.then(super().send(*args))

    async def done(self, *args: Any) -> Any:
        return await self.clock.then(super().done(*args))


class _Methods(Methods):
    clock: _Clock

    async def call(self, *args: Any) -> Any:
        self.clock.tick()
        return await self.clock.then(super().call(*args))


async def _serve(plan: Plan, told: Connection) -> None:
    clock = _Clock(plan.dies_at)
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(Database(plan.state_url, connect_s=60, wait_s=60))
        broker: Broker
        if plan.rabbitmq_url:
            broker = await stack.enter_async_context(RabbitBroker(plan.rabbitmq_url, database, heartbeat_s=5))
        else:
            broker = await stack.enter_async_context(SqliteBroker(plan.folder / "queue.sqlite"))
        pipeline = Pipeline("queueing", ServerConfig(), AllowAll(), trusted_peer="cli")
        server = grpc.aio.server(interceptors=[pipeline])
        port = server.add_insecure_port("127.0.0.1:0")
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(plan.mesh or f"127.0.0.1:{port}"))
        store, changes = _Store(database), Changes()
        requests = _Channel(broker, ack_deadline_s=1.0)
        methods = _Methods(lambda _service: MeshChannel(channel))
        for part in (store, requests, methods):
            part.clock = clock
        pace = Pace(lease_s=plan.lease_s, poll_s=0.1)
        orchestrator = Orchestrator(store, requests, methods, changes, pace)
        calls = await stack.enter_async_context(Calls(broker))
        queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker, calls), server)
        sagas_pb2_grpc.add_SagaServiceServicer_to_server(
            SagaServicer(store, orchestrator, changes, max_running=1000), server
        )
        await server.start()
        told.send(port)
        await orchestrator.run()


def _main(plan: Plan, told: Connection) -> None:
    asyncio.run(_serve(plan, told))


class Replica:
    """A running replica; use it with `async with`. Ends as by kill -9."""

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._told, told = context.Pipe(duplex=False)
        self._process = context.Process(target=_main, args=(plan, told), daemon=True)
        self._process.start()
        told.close()

    async def __aenter__(self) -> Self:
        def port() -> int:
            assert self._told.poll(READY_S), "the replica did not start"
            number: int = self._told.recv()
            return number

        self.address = f"127.0.0.1:{await asyncio.to_thread(port)}"
        self.channel = grpc.aio.insecure_channel(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await asyncio.to_thread(self.kill)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    async def died(self) -> None:
        """Wait until it has died by itself."""
        await asyncio.to_thread(self._process.join, READY_S)
        assert self._process.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()

    def pause(self) -> None:
        """Stop it in its tracks."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)
