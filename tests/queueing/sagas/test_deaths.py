"""A replica that drives sagas is killed at every point, and what another one makes of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2

from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc, sagas_pb2, sagas_pb2_grpc
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.state import Database
from tests.queueing.sagas.replica import Plan, Replica
from tests.queueing.sagas.worker import SUBSCRIPTION, Refusal, Worker, prepare

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
AT_ONCE = 8
LONG = duration_pb2.Duration(seconds=3600)
RETRY = queueing_pb2.RetryPolicy(backoff=queueing_pb2.BACKOFF_IMMEDIATE)


def action(topic: str) -> sagas_pb2.SagaAction:
    return sagas_pb2.SagaAction(topic=topic, timeout=LONG, retry=RETRY)


ORDER = sagas_pb2.SagaDefinition(
    name="order",
    steps=[
        sagas_pb2.SagaStep(name="reserve", action=action("work.reserve"), compensation=action("work.undo")),
        sagas_pb2.SagaStep(name="charge", action=action("work.charge"), compensation=action("work.undo")),
    ],
)
EFFECTS = ["reserve action", "charge action", "reserve compensation"]


def decline(content: dict[str, Any]) -> object:
    if content["step"] == "charge":
        raise Refusal("FAILED_PRECONDITION")
    return {"of": content["step"]}


async def ended(replica: Replica, saga_id: str) -> sagas_pb2.Saga:
    """Wait for the end of a saga."""
    stub = sagas_pb2_grpc.SagaServiceStub(replica.channel)
    async for _ in stub.WatchSaga(sagas_pb2.WatchSagaRequest(saga=saga_id), timeout=300):
        pass
    return await stub.GetSaga(sagas_pb2.GetSagaRequest(saga=saga_id))


async def attempts(replica: Replica, saga_id: str) -> list[str]:
    stub = sagas_pb2_grpc.SagaServiceStub(replica.channel)
    events = (await stub.ListSagaEvents(sagas_pb2.ListSagaEventsRequest(saga=saga_id))).events
    return [
        f"{event.step} {'compensation' if event.compensation else 'action'}"
        for event in events
        if event.type == sagas_pb2.SAGA_EVENT_TYPE_ATTEMPT_STARTED
    ]


async def begin(replica: Replica, saga_id: str = "s1") -> None:
    """Define and start a saga; the replica may die of it."""
    stub = sagas_pb2_grpc.SagaServiceStub(replica.channel)
    await stub.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=ORDER))
    with suppress(grpc.aio.AioRpcError):
        await stub.StartSaga(sagas_pb2.StartSagaRequest(definition="order", id=saga_id))


async def killed_at(point: int, plan: Plan) -> bool:
    """Run a saga whose replica dies at a point, if it gets there; tell whether it did."""
    plan.folder.mkdir()
    worker = Worker(decline)
    async with Replica(replace(plan, dies_at=point)) as first:
        await prepare(first.channel)
        async with worker.at(first.channel):
            await begin(first)
            with suppress(grpc.aio.AioRpcError):
                await ended(first, "s1")
                return False
            await first.died()
    async with Replica(plan) as second, worker.at(second.channel):
        saga = await ended(second, "s1")
        assert saga.state == sagas_pb2.SAGA_STATE_COMPENSATED
        assert saga.cause == sagas_pb2.SAGA_CAUSE_FAILED
        assert worker.effects == EFFECTS, f"killed at {point}"
        assert await attempts(second, "s1") == EFFECTS, f"killed at {point}"
    return True


async def test_a_saga_survives_the_death_of_its_driver_at_any_point(tmp_path: Path) -> None:
    """When it is started; before and after a request is sent, before and after its answer is written: four
    points for each of three attempts. Acknowledgements come beside them, the last perhaps after the end; that
    a request was sent is written only if its answer takes long."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(point: int) -> bool:
        folder = tmp_path / str(point)
        async with room:
            return await killed_at(point, Plan(f"sqlite:///{folder}/state.sqlite", folder))

    died = await asyncio.gather(*(one(point) for point in range(1, 20)))
    assert died[0]
    assert sum(died) >= 13, died


async def test_a_request_that_is_sent_again_is_stored_once(tmp_path: Path) -> None:
    """Killed when the request is with the broker and that is not written; nobody answers meanwhile."""
    plan = Plan(f"sqlite:///{tmp_path}/state.sqlite", tmp_path)
    async with Replica(replace(plan, dies_at=2)) as first:
        await prepare(first.channel)
        await begin(first)
        await first.died()
    async with Database(plan.state_url, wait_s=60) as database, Replica(plan) as second:
        async with asyncio.timeout(120):
            while True:
                attempt = (await DatabaseSagaStore(database).get("s1")).attempt
                if attempt is not None and attempt.deadline:
                    break
                await asyncio.sleep(0.05)
        queueing = queueing_pb2_grpc.QueueingServiceStub(second.channel)
        stats = await queueing.GetStats(queueing_pb2.GetStatsRequest(subscription=SUBSCRIPTION))
        assert (stats.ready, stats.leased) == (1, 0)


NESTED = sagas_pb2.SagaDefinition(
    name="nested",
    steps=[
        sagas_pb2.SagaStep(
            name="start",
            action=sagas_pb2.SagaAction(
                rpc=sagas_pb2.SagaRpc(method="queueing/StartSaga"), timeout=LONG, retry=RETRY
            ),
        )
    ],
)


async def test_a_call_that_its_driver_did_not_survive_is_repeated_under_the_same_request_id(
    tmp_path: Path,
) -> None:
    """Killed before the call, after it, and when its answer is written."""
    NESTED.steps[0].action.rpc.request.update({"definition": "order", "input": {"of": "${saga.id}"}})

    async def one(point: int) -> None:
        folder = tmp_path / str(point)
        folder.mkdir()
        url = f"sqlite:///{folder}/state.sqlite"
        async with Replica(Plan(url, folder)) as other:  # called, not killed; has data of its own
            await prepare(other.channel)
            theirs = sagas_pb2_grpc.SagaServiceStub(other.channel)
            await theirs.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=ORDER))
            own = folder / "own"
            own.mkdir()
            plan = Plan(f"sqlite:///{own}/state.sqlite", own, mesh=other.address)
            async with Replica(replace(plan, dies_at=point)) as first:
                stub = sagas_pb2_grpc.SagaServiceStub(first.channel)
                await stub.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=NESTED))
                with suppress(grpc.aio.AioRpcError):
                    await stub.StartSaga(sagas_pb2.StartSagaRequest(definition="nested", id="s1"))
                await first.died()
            async with Replica(plan) as second:
                saga = await ended(second, "s1")
                assert saga.state == sagas_pb2.SAGA_STATE_SUCCEEDED
                assert await attempts(second, "s1") == ["start action"]
            (begun,) = (await theirs.ListSagas(sagas_pb2.ListSagasRequest())).sagas
            assert saga.steps[0].result.struct_value["id"] == begun.id

    await asyncio.gather(*(one(point) for point in range(1, 4)))
