"""What a worker may answer, and what becomes of it."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf import json_format

from plexus.queueing.v1 import sagas_pb2
from services.queueing.domain import Message
from services.queueing.replies import Kind, Reply
from services.queueing.sagas.requests import REPLIES
from tests.queueing.sagas.worker import Worker
from tests.queueing.sagas.world import RESERVE, WITHIN_S, World


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", None),
        (b'{"a": [1, 2.5, null]}', {"a": [1.0, 2.5, None]}),
        (b"plain words", "plain words"),
        (b'"\\ud800"', '"\\ud800"'),
        (b"NaN", "NaN"),
        (b"\xff\x00", "\ufffd\x00"),
    ],
)
async def test_any_reply_becomes_a_result(world: World, data: bytes, result: object) -> None:
    await world.define(RESERVE)
    await world.start("s1")
    attempt = (await world.store.get("s1")).attempt
    assert attempt is not None
    await world.broker.publish(REPLIES, [Reply(attempt.call_id, Kind.RESULT, data).message()])
    saga = await world.reaches("s1")
    assert json_format.MessageToDict(saga.steps[0].result) == result


@pytest.mark.parametrize("data", [b'"' + b"x" * 65536 + b'"', b"[" * 40 + b"]" * 40])
async def test_a_result_over_the_bounds_is_a_failure_that_is_undone(world: World, data: bytes) -> None:
    await world.define(RESERVE)
    await world.start("s1")
    attempt = (await world.store.get("s1")).attempt
    assert attempt is not None
    await world.broker.publish(REPLIES, [Reply(attempt.call_id, Kind.RESULT, data).message()])
    saga = await world.reaches("s1", lambda each: each.state == sagas_pb2.SAGA_STATE_COMPENSATING)
    assert saga.error_code == "DATA_LOSS"


async def test_hostile_replies_change_nothing_and_stop_nothing(world: World) -> None:
    await world.define(RESERVE)
    await world.start("s1")
    hostile = [
        Message(b"x"),
        Message(b"x", {"plexus-call-id": "s1.0a1.guessed", "plexus-reply": "result"}),
        Message(b"x", {"plexus-call-id": "s1", "plexus-reply": "result"}),
        Message(b"x", {"plexus-call-id": "nobody.0a1.x", "plexus-reply": "error"}),
        Message(b"x", {"plexus-call-id": "../..", "plexus-reply": "result"}),
        Message(b"x", {"plexus-call-id": "s1.0a1.x", "plexus-reply": "nonsense"}),
    ]
    await world.broker.publish(REPLIES, hostile)
    async with Worker(lambda _content: None).at(world.channel):
        saga = await world.reaches("s1")
    assert saga.state == sagas_pb2.SAGA_STATE_SUCCEEDED
    async with asyncio.timeout(WITHIN_S):
        while True:
            if not await _unread(world):
                break
            await asyncio.sleep(0.05)
    assert (await world.broker.stats(REPLIES)).dead == 0


async def _unread(world: World) -> int:
    stats = await world.broker.stats(REPLIES)
    return stats.ready + stats.leased + stats.delayed
