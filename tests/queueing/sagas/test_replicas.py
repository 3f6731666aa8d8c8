"""Two replicas with one PostgreSQL and one RabbitMQ: killed, stopped, and shared work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from plexus.queueing.v1 import sagas_pb2, sagas_pb2_grpc
from tests.queueing.sagas.replica import Plan, Replica
from tests.queueing.sagas.test_deaths import EFFECTS, ORDER, attempts, decline, ended
from tests.queueing.sagas.worker import Worker, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.postgres import PostgresServer
    from tests.servers.rabbitmq import RabbitServer

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.xdist_group("postgres")]
SAGAS = 12


@pytest.fixture
def plan(
    postgres: PostgresServer, rabbitmq: RabbitServer, rabbitmq_vhost: str, tmp_path: Path
) -> Iterator[Plan]:
    with postgres.database() as url:
        yield Plan(url, tmp_path, rabbitmq.url(rabbitmq_vhost), lease_s=2.0)


async def define(replica: Replica) -> sagas_pb2_grpc.SagaServiceStub:
    await prepare(replica.channel)
    stub = sagas_pb2_grpc.SagaServiceStub(replica.channel)
    await stub.CreateSagaDefinition(sagas_pb2.CreateSagaDefinitionRequest(definition=ORDER))
    return stub


async def start(stub: sagas_pb2_grpc.SagaServiceStub, count: int = SAGAS) -> list[str]:
    started = (
        stub.StartSaga(sagas_pb2.StartSagaRequest(definition="order", id=f"s{number}"))
        for number in range(count)
    )
    return [saga.id for saga in await asyncio.gather(*started)]


async def check(replica: Replica, saga_ids: list[str], worker: Worker) -> None:
    """Each saga was undone, in order, with no attempt more than it needed."""
    for saga_id in saga_ids:
        assert (await ended(replica, saga_id)).state == sagas_pb2.SAGA_STATE_COMPENSATED
        assert await attempts(replica, saga_id) == EFFECTS
        assert worker.effects_of(saga_id) == EFFECTS


async def test_replicas_share_sagas_and_one_goes_on_when_the_other_is_killed(plan: Plan) -> None:
    worker = Worker(decline)
    async with Replica(plan) as first, Replica(plan) as second:
        saga_ids = await start(await define(first))
        async with worker.at(second.channel):
            await ended(second, saga_ids[0])
            await asyncio.to_thread(first.kill)
            more = sagas_pb2_grpc.SagaServiceStub(second.channel)
            late = await more.StartSaga(sagas_pb2.StartSagaRequest(definition="order", id="late"))
            await check(second, [*saga_ids, late.id], worker)


async def test_a_replica_that_was_stopped_for_long_does_nothing_twice(plan: Plan) -> None:
    held = asyncio.Event()

    def handler(content: dict[str, Any]) -> object:
        held.set()
        return decline(content)

    worker = Worker(handler)
    async with Replica(plan) as first, Replica(plan) as second:
        saga_ids = await start(await define(first))
        async with worker.at(second.channel):
            await held.wait()
            first.pause()
            try:
                await check(second, saga_ids, worker)
            finally:
                first.resume()
            await check(first, saga_ids, worker)
