"""The queueing service with its sagas, alone in a process: no mesh, no TLS.

    python benchmarks/_sagas_service.py FOLDER [STATE_URL]

Says its port as a JSON line; for each line it reads, what its state's transactions were so far and its
process's CPU time. Messages are in a SQLite file, every commit waiting for the disk, and so are the sagas
unless a PostgreSQL is named for them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
from sqlalchemy import event

from plexus.client.channel import MeshChannel
from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
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


class Counted:
    """Counts what a database is asked."""

    def __init__(self, database: Database) -> None:
        self.statements = self.commits = 0
        engine = database._engine.sync_engine  # noqa: SLF001 - to look on, not to change

        @event.listens_for(engine, "after_cursor_execute")
        def executed(*_: object) -> None:
            self.statements += 1

        @event.listens_for(engine, "commit")
        def committed(connection: object) -> None:
            if not connection.get_execution_options().get("reads"):  # type: ignore[attr-defined]
                self.commits += 1


async def _serve(folder: Path, state_url: str) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(SqliteBroker(folder / "queue.sqlite"))
        database = await stack.enter_async_context(Database(state_url))
        counted = Counted(database)
        pipeline = Pipeline("queueing", ServerConfig(), AllowAll(), trusted_peer="cli")
        server = grpc.aio.server(interceptors=[pipeline])
        port = server.add_insecure_port("127.0.0.1:0")
        mesh = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        store, changes = DatabaseSagaStore(database), Changes()
        methods = Methods(lambda _service: MeshChannel(mesh))
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
        print(json.dumps({"port": port}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            used = os.times()
            figures = {"statements": counted.statements, "commits": counted.commits}
            print(json.dumps({"answer": figures | {"cpu_s": used.user + used.system}}), flush=True)


if __name__ == "__main__":
    configure_logging("bench", TelemetryConfig(log_level="error"))
    where = Path(sys.argv[1])
    asyncio.run(_serve(where, sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{where}/state.sqlite"))
