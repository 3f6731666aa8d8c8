"""SagaService over a real server, with a worker on its topics and methods of its own mesh."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2, json_format

from plexus.client.failures import problem
from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2, sagas_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.queueing.backends.sqlite import SqliteBroker
    from services.queueing.sagas.store import DatabaseSagaStore
    from services.queueing.sagas.watching import Changes
    from services.queueing.state import Database


WITHIN_S = 60
LEASE_S = 6.0
PATIENCE = duration_pb2.Duration(seconds=30)
AT_ONCE = {"backoff": "BACKOFF_IMMEDIATE", "maxAttempts": 2}


@dataclass
class World:
    """A service, its clients, and what they made; `edge` is the way in for end users."""

    channel: grpc.aio.Channel
    database: Database
    store: DatabaseSagaStore
    broker: SqliteBroker
    changes: Changes
    sagas: sagas_pb2_grpc.SagaServiceStub
    queueing: queueing_pb2_grpc.QueueingServiceStub
    edge: grpc.aio.Channel
    driving: asyncio.Task[None]

    async def define(self, *steps: dict[str, Any], name: str = "order") -> sagas_pb2.SagaDefinition:
        request = sagas_pb2.CreateSagaDefinitionRequest(definition=definition(*steps, name=name))
        return await self.sagas.CreateSagaDefinition(request)

    async def start(self, saga_id: str = "", **more: Any) -> sagas_pb2.Saga:
        request = {"definition": "order", "id": saga_id, "input": {"sku": 7}} | more
        return await self.sagas.StartSaga(json_format.ParseDict(request, sagas_pb2.StartSagaRequest()))

    async def get(self, saga_id: str) -> sagas_pb2.Saga:
        return await self.sagas.GetSaga(sagas_pb2.GetSagaRequest(saga=saga_id))

    async def reaches(
        self, saga_id: str, reached: Callable[[sagas_pb2.Saga], bool] = lambda saga: saga.HasField("end_time")
    ) -> sagas_pb2.Saga:
        """Wait until a saga is where it should come to."""
        saga = await self.get(saga_id)
        async with asyncio.timeout(WITHIN_S):
            while not reached(saga):
                with self.changes.of(saga_id) as watcher:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.1):
                            await watcher.changed.wait()
                    saga = await self.get(saga_id)
        return saga

    async def events(self, saga_id: str) -> list[str]:
        found = await self.sagas.ListSagaEvents(sagas_pb2.ListSagaEventsRequest(saga=saga_id))
        return [told(event) for event in found.events]


def told(event: sagas_pb2.SagaEvent) -> str:
    kind = sagas_pb2.SagaEventType.Name(event.type).removeprefix("SAGA_EVENT_TYPE_").lower()
    return f"{event.step}{'!' if event.compensation else ''} {kind}".strip()


def definition(*steps: dict[str, Any], name: str = "order") -> sagas_pb2.SagaDefinition:
    return json_format.ParseDict({"name": name, "steps": list(steps)}, sagas_pb2.SagaDefinition())


def topic(name: str, timeout: str = "600s", **more: Any) -> dict[str, Any]:
    return {"topic": f"work.{name}", "timeout": timeout, "retry": AT_ONCE} | more


def rpc(method: str, **request: Any) -> dict[str, Any]:
    return {"rpc": {"method": method, "request": request}, "timeout": "60s", "retry": AT_ONCE}


RESERVE = {"name": "reserve", "action": topic("reserve"), "compensation": topic("undo")}
CHARGE = {"name": "charge", "action": topic("charge"), "compensation": topic("undo")}


async def refused(call: Any) -> tuple[str, str]:
    """The code and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = problem(caught.value)
    return found.code.name, found.reason


async def refused_field(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return problem(caught.value).violations[0].field
