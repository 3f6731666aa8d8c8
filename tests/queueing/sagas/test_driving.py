"""Leases of sagas, those who watch them, and what is logged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio
import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from plexus.queueing.v1 import sagas_pb2
from services.queueing.sagas.contract import Change, Made
from services.queueing.sagas.domain import Kind
from services.queueing.sagas.machine import Cancel, Succeeded
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.tables import SAGAS
from services.queueing.sagas.watching import Changes, watch
from tests.queueing.sagas.worker import Worker
from tests.queueing.sagas.world import CHARGE, RESERVE, WITHIN_S, World, refused, rpc, told

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.queueing.sagas.domain import Record, Saga


async def waiting_call(world: World) -> None:
    """Start a saga that is in the middle of a call."""
    wait = rpc("queueing/Pull", subscription="worker", wait="60s")
    await world.define({"name": "wait", "action": wait | {"timeout": "600s"}})
    await world.start("s1")
    async with asyncio.timeout(WITHIN_S):
        while True:
            if (await _lease(world))[0]:
                return
            await asyncio.sleep(0.02)


async def _lease(world: World) -> tuple[str, float]:
    async with world.database.reading() as connection:
        row = (await connection.execute(select(SAGAS.c.owner, SAGAS.c.leased_until))).one()
    return row.owner, row.leased_until


async def test_a_saga_whose_call_takes_long_stays_with_its_driver(world: World) -> None:
    await waiting_call(world)
    owner, first = await _lease(world)
    async with asyncio.timeout(WITHIN_S):
        while True:
            renewed = await _lease(world)
            if renewed[1] > first:
                break
            await asyncio.sleep(0.1)
    assert renewed[0] == owner


async def test_a_driver_that_stops_in_order_leaves_its_sagas_to_others_at_once(world: World) -> None:
    await waiting_call(world)
    world.driving.cancel()
    await asyncio.gather(world.driving, return_exceptions=True)
    assert (await _lease(world))[0] == ""
    assert (await world.get("s1")).state == sagas_pb2.SAGA_STATE_RUNNING


async def test_a_watcher_sees_each_change_and_can_go_on_where_it_was(world: World) -> None:
    await world.define(RESERVE, CHARGE)
    await world.start("s1")
    request = sagas_pb2.WatchSagaRequest(saga="s1")
    call = world.sagas.WatchSaga(request)
    first = cast("sagas_pb2.WatchSagaResponse", await call.read())
    assert told(first.event) == "started"
    call.cancel()
    resumed = world.sagas.WatchSaga(
        sagas_pb2.WatchSagaRequest(saga="s1", after_revision=first.event.revision), timeout=WITHIN_S
    )
    async with Worker(lambda _content: None).at(world.channel):
        seen = [response.event async for response in resumed]
    assert [first.event.revision, *(event.revision for event in seen)] == list(range(1, len(seen) + 2))
    assert told(seen[-1]) == "succeeded"
    assert [told(event) for event in (first.event, *seen)] == await world.events("s1")
    again = [response async for response in world.sagas.WatchSaga(request)]
    assert len(again) == len(seen) + 1
    none = world.sagas.WatchSaga(sagas_pb2.WatchSagaRequest(saga="none")).read()
    assert await refused(none) == ("NOT_FOUND", "SAGA_NOT_FOUND")


class _Between(DatabaseSagaStore):
    """A store in which a saga ends between two reads of a watcher."""

    async def get(self, saga_id: str) -> Saga:
        saga = await super().get(saga_id)
        if saga.attempt is not None:
            await self.write([Change(saga_id, Succeeded(saga.attempt.call_id))])
        return saga


async def test_a_watcher_sees_the_end_however_it_falls_between_its_reads(world: World) -> None:
    await world.define(RESERVE)
    await world.start("s1")
    async with asyncio.timeout(WITHIN_S):
        seen = [record async for record in watch(_Between(world.database), Changes(), "s1", 0)]
    assert seen[-1] is not None
    assert seen[-1].kind is Kind.SUCCEEDED


async def test_a_watcher_reads_again_what_others_wrote_in_between(world: World) -> None:
    await world.define(RESERVE, CHARGE)
    changes = Changes()
    saga = await world.start("s1")
    everything = await world.store.events("s1", limit=100)
    changes.tell("s1", everything)
    told = cast("AsyncGenerator[Record | None]", watch(world.store, changes, "s1", 0))
    assert [await anext(told) for _ in everything] == everything
    (made,) = await world.store.write([Change("s1", Cancel())])
    assert isinstance(made, Made)
    changes.compare(["s1"], await world.store.revisions(changes.watched()))
    assert [await anext(told) for _ in made.records] == list(made.records)
    await told.aclose()
    assert made.saga.revision > saga.revision


async def test_a_watcher_of_a_silent_saga_gets_signs_of_life_until_the_service_stops(world: World) -> None:
    await world.define(RESERVE)
    saga = await world.start("s1")
    watched = watch(world.store, world.changes, "s1", saga.revision, alive_s=0.1)
    assert await anext(watched) is None
    world.changes.stopping.set()
    call = world.sagas.WatchSaga(sagas_pb2.WatchSagaRequest(saga="s1"), timeout=WITHIN_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [each async for each in call]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_happens_is_logged_without_payloads(world: World) -> None:
    await world.define(RESERVE)
    with capture_logs() as logs:
        async with Worker(lambda _content: "private").at(world.channel):
            await world.start("s1", input={"word": "secret"})
            await world.reaches("s1")
    ours = [entry for entry in logs if entry.get("saga") == "s1"]
    assert [entry["event"] for entry in ours] == ["saga_succeeded"]
    assert "secret" not in str(logs)
    assert "private" not in str(logs)
