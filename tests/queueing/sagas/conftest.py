"""The fixture of the tests of SagaService."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from plexus.client.channel import MeshChannel
from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.sagas.methods import Methods
from services.queueing.sagas.orchestrator import Orchestrator, Pace
from services.queueing.sagas.requests import Channel
from services.queueing.sagas.servicer import SagaServicer
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.watching import Changes
from services.queueing.servicer import QueueingServicer
from services.queueing.state import Database
from tests.queueing.sagas.worker import prepare
from tests.queueing.sagas.world import LEASE_S, WITHIN_S, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc.aio

    from tests.conftest import Serve


@pytest.fixture
async def world(tmp_path: Path, serve: Serve) -> AsyncIterator[World]:
    async with (
        SqliteBroker(tmp_path / "queue.sqlite") as broker,
        Database(f"sqlite:///{tmp_path}/state.sqlite", wait_s=WITHIN_S) as database,
        Calls(broker) as calls,
    ):
        store, changes = DatabaseSagaStore(database), Changes()
        mesh: list[grpc.aio.Channel] = []
        methods = Methods(lambda _service: MeshChannel(mesh[0]))
        pace = Pace(lease_s=LEASE_S, poll_s=0.2)
        orchestrator = Orchestrator(store, Channel(broker), methods, changes, pace)
        servicer = SagaServicer(store, orchestrator, changes, max_running=20)

        def add(server: grpc.aio.Server) -> None:
            sagas_pb2_grpc.add_SagaServiceServicer_to_server(servicer, server)
            queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker, calls), server)

        async with serve(add) as channel, serve(add, peer="edge") as edge:
            mesh.append(channel)
            driving = asyncio.create_task(orchestrator.run())
            try:
                await prepare(channel)
                sagas = sagas_pb2_grpc.SagaServiceStub(channel)
                queueing = queueing_pb2_grpc.QueueingServiceStub(channel)
                yield World(channel, database, store, broker, changes, sagas, queueing, edge, driving)
            finally:
                driving.cancel()
                await asyncio.gather(driving, return_exceptions=True)
