"""Sagas step by step: results, failures, compensations, answers that do not come, cancellation."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import duration_pb2, json_format

from plexus.queueing.v1 import queueing_pb2, sagas_pb2
from services.queueing.replies import Kind, Reply
from services.queueing.sagas.requests import REPLIES
from tests.queueing.sagas.worker import Refusal, Silence, Worker
from tests.queueing.sagas.world import CHARGE, PATIENCE, RESERVE, World, refused, topic


async def test_steps_get_the_input_and_the_results_before_them(world: World) -> None:
    worker = Worker(lambda content: {"ran": content["step"], "n": 2})
    await world.define(RESERVE, CHARGE)
    async with worker.at(world.channel):
        started = await world.start("s1")
        assert (started.state, started.version) == (sagas_pb2.SAGA_STATE_RUNNING, 1)
        saga = await world.reaches("s1")
    assert saga.state == sagas_pb2.SAGA_STATE_SUCCEEDED
    assert [json_format.MessageToDict(step.result) for step in saga.steps] == [
        {"ran": step, "n": 2.0} for step in ("reserve", "charge")
    ]
    assert worker.requests[1] == {
        "saga_id": "s1",
        "step": "charge",
        "phase": "action",
        "attempt": 1,
        "input": {"sku": 7},
        "results": {"reserve": {"ran": "reserve", "n": 2}},
    }
    assert await world.events("s1") == [
        "started",
        "reserve attempt_started",
        "reserve attempt_succeeded",
        "charge attempt_started",
        "charge attempt_succeeded",
        "succeeded",
    ]


async def test_a_failed_step_undoes_those_before_it_the_last_first(world: World) -> None:
    def handler(content: dict[str, Any]) -> object:
        if content["step"] == "ship":
            raise Refusal("FAILED_PRECONDITION")
        return None

    worker = Worker(handler)
    await world.define(RESERVE, CHARGE, {"name": "ship", "action": topic("inform")})
    async with worker.at(world.channel):
        await world.start("s1")
        saga = await world.reaches("s1")
    assert (saga.state, saga.cause, saga.error_code, saga.error) == (
        sagas_pb2.SAGA_STATE_COMPENSATED,
        sagas_pb2.SAGA_CAUSE_FAILED,
        "FAILED_PRECONDITION",
        "no",
    )
    assert worker.effects == [
        "reserve action",
        "charge action",
        "ship action",
        "charge compensation",
        "reserve compensation",
    ]


async def test_a_step_without_an_answer_is_tried_again_then_undone(world: World) -> None:
    def handler(content: dict[str, Any]) -> object:
        if content["phase"] == "action":
            raise Silence
        return None

    worker = Worker(handler)
    await world.define({**RESERVE, "action": topic("reserve", timeout="0.3s")})
    async with worker.at(world.channel):
        await world.start("s1")
        saga = await world.reaches("s1")
        assert (saga.state, saga.cause) == (
            sagas_pb2.SAGA_STATE_COMPENSATED,
            sagas_pb2.SAGA_CAUSE_TIMED_OUT,
        )
        assert saga.steps[0].attempts == 2
        overdue = (await world.store.get("s1")).overdue[0]
        late = Reply(overdue, Kind.RESULT, b'{"id": 1}').message()
        for _ in range(2):
            await world.broker.publish(REPLIES, [late])
        await world.reaches("s1", lambda each: each.revision > saga.revision)
    after = await world.get("s1")
    assert after.state == saga.state
    assert (await world.events("s1"))[-1] == "reserve late_reply"


async def test_a_worker_that_is_not_there_is_waited_for(world: World) -> None:
    await world.queueing.CreateTopic(queueing_pb2.CreateTopicRequest(topic="lonely"))
    patient = {
        "topic": "lonely",
        "retry": {"backoff": "BACKOFF_FIXED", "minimum": "0.1s", "maxAttempts": 1000},
    }
    await world.define({"name": "wait", "action": patient})
    await world.start("s1")
    saga = await world.reaches("s1", lambda each: each.steps[0].attempts > 1)
    assert saga.steps[0].error_code == "UNAVAILABLE"
    subscription = queueing_pb2.Subscription(name="late", topic="lonely")
    await world.queueing.CreateSubscription(queueing_pb2.CreateSubscriptionRequest(subscription=subscription))
    pull = queueing_pb2.PullRequest(subscription="late", wait=PATIENCE)
    (delivery,) = (await world.queueing.Pull(pull)).deliveries
    assert json.loads(delivery.data)["saga_id"] == "s1"
    assert (delivery.correlation_id, delivery.ordering_key) == ("s1", "s1")
    assert delivery.attributes["plexus-saga-phase"] == "action"


async def test_a_step_on_a_topic_that_is_not_there_fails(world: World) -> None:
    await world.define({"name": "a", "action": {"topic": "nowhere"}, "compensation": {"topic": "nowhere"}})
    await world.start("s1")
    saga = await world.reaches("s1")
    assert (saga.state, saga.error_code) == (sagas_pb2.SAGA_STATE_COMPENSATED, "FAILED_PRECONDITION")
    assert saga.steps[0].state == sagas_pb2.SAGA_STEP_STATE_FAILED  # never sent: nothing to undo


async def test_a_stuck_saga_is_seen_and_goes_on_when_told(world: World) -> None:
    broken = True

    def handler(content: dict[str, Any]) -> object:
        if content["step"] == "charge":
            raise Refusal("FAILED_PRECONDITION")
        if content["phase"] == "compensation" and broken:
            raise Refusal("INTERNAL")
        return None

    await world.define(RESERVE, CHARGE)
    async with Worker(handler).at(world.channel):
        for saga_id in ("s1", "s2"):
            await world.start(saga_id)
        for saga_id in ("s1", "s2"):
            saga = await world.reaches(saga_id, lambda each: each.state == sagas_pb2.SAGA_STATE_STUCK)
            assert (saga.error_code, saga.steps[0].compensation_attempts) == ("INTERNAL", 2)
            assert saga.steps[0].state == sagas_pb2.SAGA_STEP_STATE_STUCK
        stuck = sagas_pb2.ListSagasRequest(state=sagas_pb2.SAGA_STATE_STUCK)
        assert [one.id for one in (await world.sagas.ListSagas(stuck)).sagas] == ["s2", "s1"]
        assert (await refused(world.sagas.CancelSaga(sagas_pb2.CancelSagaRequest(saga="s1"))))[
            1
        ] == "SAGA_STUCK"
        broken = False
        await world.sagas.RetrySaga(sagas_pb2.RetrySagaRequest(saga="s1"))
        assert (await world.reaches("s1")).state == sagas_pb2.SAGA_STATE_COMPENSATED
        by_hand = await world.sagas.RetrySaga(sagas_pb2.RetrySagaRequest(saga="s2", skip=True))
        assert by_hand.state == sagas_pb2.SAGA_STATE_COMPENSATED
    retry = world.sagas.RetrySaga(sagas_pb2.RetrySagaRequest(saga="s1"))
    assert await refused(retry) == ("FAILED_PRECONDITION", "SAGA_NOT_STUCK")


async def test_a_cancelled_saga_is_undone_when_its_attempt_has_ended(world: World) -> None:
    await world.define(RESERVE, CHARGE)
    await world.start("s1")
    pull = queueing_pb2.PullRequest(subscription="worker", wait=PATIENCE)
    (delivery,) = (await world.queueing.Pull(pull)).deliveries  # a worker has begun
    saga = await world.sagas.CancelSaga(sagas_pb2.CancelSagaRequest(saga="s1"))
    assert (saga.state, saga.cause) == (sagas_pb2.SAGA_STATE_RUNNING, sagas_pb2.SAGA_CAUSE_CANCELLED)
    worker = Worker(lambda _content: None)
    await world.queueing.Nack(
        queueing_pb2.NackRequest(
            subscription="worker",
            refusals=[queueing_pb2.Refusal(ack_id=delivery.ack_id, delay=duration_pb2.Duration())],
        )
    )
    async with worker.at(world.channel):
        saga = await world.reaches("s1")
    assert saga.state == sagas_pb2.SAGA_STATE_COMPENSATED
    assert worker.effects == ["reserve action", "reserve compensation"]
    cancel = world.sagas.CancelSaga(sagas_pb2.CancelSagaRequest(saga="s1"))
    assert await refused(cancel) == ("FAILED_PRECONDITION", "SAGA_ENDED")
