"""Results that are found by the id of their task, by who did not ask for them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

import plexus.client
from plexus.client.kept import new_id

if TYPE_CHECKING:
    from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub

pytestmark = pytest.mark.timeout(400)
LONG_S = 150.0


def shop(*, keep_s: float) -> plexus.client.TaskApp:
    app = plexus.client.TaskApp("shop")

    @app.task(keep_s=keep_s)
    async def invoice(order: int) -> dict[str, int]:
        if order < 0:
            raise plexus.client.TaskError("no such order", reason="ORDER_NOT_FOUND")
        return {"order": order}

    return app


async def test_a_result_is_found_by_others_when_who_asked_has_gone(killable: QueueingServiceStub) -> None:
    asking, finding, working = shop(keep_s=3600), shop(keep_s=3600), shop(keep_s=0)
    async with asyncio.timeout(2 * LONG_S):
        async with asking.open(killable):
            ids = [(await asking.tasks["invoice"].delay(order)).call_id for order in (17, -1)]
        invoice = finding.tasks["invoice"]
        async with finding.open(killable):
            with pytest.raises(TimeoutError):  # expected, and not there
                await invoice.find(ids[0], timeout_s=0.5)
            worker = plexus.client.Worker(working, killable)
            running = asyncio.create_task(worker.run())
            assert await invoice.find(ids[0], timeout_s=LONG_S) == {"order": 17}
            assert await invoice.find(ids[0], timeout_s=LONG_S) == {"order": 17}
            with pytest.raises(plexus.client.TaskFailedError) as failed:
                await invoice.find(ids[1], timeout_s=LONG_S)
            assert (failed.value.code, failed.value.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "ORDER_NOT_FOUND",
            )
            for unknown in (new_id(), "nonsense", ""):
                with pytest.raises(plexus.client.ResultNotFoundError):
                    await invoice.find(unknown, timeout_s=LONG_S)
            worker.drain()
            await running


async def test_a_result_is_forgotten_in_time_and_none_is_kept_unasked(queueing: QueueingServiceStub) -> None:
    kept, unkept = shop(keep_s=1), shop(keep_s=0)
    async with asyncio.timeout(2 * LONG_S), kept.open(queueing), unkept.open(queueing):
        worker = plexus.client.Worker(kept, queueing)
        running = asyncio.create_task(worker.run())
        silent = await unkept.tasks["invoice"].delay(1)
        await silent.result(timeout_s=LONG_S)
        with pytest.raises(plexus.client.ResultNotFoundError):
            await unkept.tasks["invoice"].find(silent.call_id, timeout_s=LONG_S)
        handle = await kept.tasks["invoice"].delay(2)
        await handle.result(timeout_s=LONG_S)

        async def until_forgotten() -> None:
            while True:
                assert await kept.tasks["invoice"].find(handle.call_id, timeout_s=LONG_S) == {"order": 2}
                await asyncio.sleep(0.1)

        with pytest.raises(plexus.client.ResultNotFoundError):
            await until_forgotten()
        worker.drain()
        await running


def test_how_long_a_result_is_kept_has_bounds() -> None:
    for keep_s in (-1, 0.5, 400 * 24 * 3600):
        with pytest.raises(ValueError, match="keep_s"):
            shop(keep_s=keep_s)
