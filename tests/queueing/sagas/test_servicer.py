"""SagaService over a real server, with a worker on its topics and methods of its own mesh."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2, json_format
from sqlalchemy import select
from structlog.testing import capture_logs

from plexus.client.channel import MeshChannel
from plexus.client.failures import problem
from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc, sagas_pb2, sagas_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.domain import Message
from services.queueing.replies import Kind, Reply
from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.methods import Methods
from services.queueing.sagas.orchestrator import Orchestrator, Pace
from services.queueing.sagas.requests import REPLIES, Channel
from services.queueing.sagas.servicer import SagaServicer
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.tables import SAGAS
from services.queueing.sagas.watching import Changes, watch
from services.queueing.servicer import QueueingServicer
from services.queueing.state import Database
from tests.queueing.sagas.worker import Refusal, Silence, Worker, prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.conftest import Serve

WITHIN_S = 60
LEASE_S = 6.0
PATIENCE = duration_pb2.Duration(seconds=30)
AT_ONCE = {"backoff": "BACKOFF_IMMEDIATE", "maxAttempts": 2}


@dataclass
class World:
    """A service, its clients, and what they made."""

    channel: grpc.aio.Channel
    database: Database
    store: DatabaseSagaStore
    broker: SqliteBroker
    changes: Changes
    sagas: sagas_pb2_grpc.SagaServiceStub
    queueing: queueing_pb2_grpc.QueueingServiceStub

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
                with self.changes.of(saga_id) as changed:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.1):
                            await changed.wait()
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
        servicer = SagaServicer(store, orchestrator, changes, max_running=20, poll_s=0.2)

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
                yield EdgeWorld(channel, database, store, broker, changes, sagas, queueing, edge, driving)
            finally:
                driving.cancel()
                await asyncio.gather(driving, return_exceptions=True)


@dataclass
class EdgeWorld(World):
    """The same, with the way in for end users."""

    edge: grpc.aio.Channel
    driving: asyncio.Task[None]


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


# Definitions.


async def test_a_definition_is_made_changed_listed_and_deleted(world: World) -> None:
    made = await world.define(RESERVE, {"name": "bare", "action": {"topic": "t"}})
    assert (made.version, made.steps[0].compensation.topic) == (1, "work.undo")
    assert (made.steps[1].action.timeout.seconds, made.steps[1].action.retry.max_attempts) == (30, 5)
    assert not made.steps[1].HasField("compensation")
    changed = await world.sagas.UpdateSagaDefinition(
        sagas_pb2.UpdateSagaDefinitionRequest(definition=definition(CHARGE))
    )
    assert (changed.version, [step.name for step in changed.steps]) == (2, ["charge"])
    await world.define(RESERVE, name="another")
    page = await world.sagas.ListSagaDefinitions(sagas_pb2.ListSagaDefinitionsRequest(page_size=1))
    rest = await world.sagas.ListSagaDefinitions(
        sagas_pb2.ListSagaDefinitionsRequest(page_token=page.next_page_token)
    )
    assert [(one.name, one.version) for one in (*page.definitions, *rest.definitions)] == [
        ("another", 1),
        ("order", 2),
    ]
    old = await world.sagas.GetSagaDefinition(
        sagas_pb2.GetSagaDefinitionRequest(definition="order", version=1)
    )
    assert old == made
    await world.sagas.DeleteSagaDefinition(sagas_pb2.DeleteSagaDefinitionRequest(definition="order"))
    get = world.sagas.GetSagaDefinition(sagas_pb2.GetSagaDefinitionRequest(definition="order"))
    assert await refused(get) == ("NOT_FOUND", "SAGA_DEFINITION_NOT_FOUND")


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"action": rpc("storage/Nonsense")}, "action.rpc.method"),
        ({"action": rpc("nonsense/CreateBucket")}, "action.rpc.method"),
        ({"action": rpc("../CreateBucket")}, "action.rpc.method"),
        ({"action": rpc("queueing/StreamingPull")}, "action.rpc.method"),
        ({"action": rpc("mesh/ListPolicies")}, "action.rpc.method"),
        ({"action": rpc("queueing/CreateTopic", nonsense="x")}, "action.rpc.request.nonsense"),
        (
            {"action": rpc("queueing/CreateTopic", settings={"logs": True})},
            "action.rpc.request.settings.logs",
        ),
        ({"action": rpc("queueing/CreateTopic", topic=5)}, "action.rpc.request"),
        (
            {"action": rpc("queueing/CreateTopic", settings={"x": "${input.a}"})},
            "action.rpc.request.settings.x",
        ),
        ({"action": topic("a", timeout="0s")}, "action.timeout"),
        ({"action": topic("a", retry={"maxAttempts": 5000})}, "action.retry"),
    ],
)
async def test_a_definition_that_could_not_run_is_refused(
    world: World, step: dict[str, Any], field: str
) -> None:
    where = await refused_field(world.define({"name": "a", **step}))
    assert where == f"definition.steps[0].{field}"


async def test_a_saga_gives_nobody_rights_that_he_has_not(world: EdgeWorld) -> None:
    stub = sagas_pb2_grpc.SagaServiceStub(world.edge)
    made = definition({"name": "drop", "action": rpc("queueing/DeleteTopic", topic="work.reserve")})
    request = sagas_pb2.CreateSagaDefinitionRequest(definition=made)
    ann = (("x-consumer-username", "ann"), ("x-consumer-groups", "writers"))
    assert await refused(stub.CreateSagaDefinition(request, metadata=ann)) == (
        "PERMISSION_DENIED",
        "GROUP_REQUIRED",
    )
    update = sagas_pb2.UpdateSagaDefinitionRequest(definition=made)
    assert (await refused(stub.UpdateSagaDefinition(update, metadata=ann)))[0] == "PERMISSION_DENIED"
    root = (("x-consumer-username", "root"), ("x-consumer-groups", "writers,admins"))
    assert (await stub.CreateSagaDefinition(request, metadata=root)).version == 1


# Sagas.


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


async def test_methods_are_called_with_what_references_give(world: World) -> None:
    create = rpc(
        "queueing/CreateTopic", topic="of-${saga.id}", settings={"labels": {"sku": "${input.label}"}}
    )
    subscribe = rpc(
        "queueing/CreateSubscription",
        subscription={"name": "sub-${input.label}", "topic": "${results.create.name}", "ackDeadline": "60s"},
    )
    await world.define(
        {
            "name": "create",
            "action": create,
            "compensation": rpc("queueing/DeleteTopic", topic="of-${saga.id}"),
        },
        {"name": "subscribe", "action": subscribe},
        {"name": "fail", "action": rpc("queueing/GetTopic", topic="${input.missing}")},
    )
    await world.start("s1", input={"label": "x"})
    saga = await world.reaches("s1")
    assert (saga.state, saga.error_code) == (sagas_pb2.SAGA_STATE_COMPENSATED, "INVALID_ARGUMENT")
    assert "${input.missing}" in saga.error
    made = json_format.MessageToDict(saga.steps[0].result)
    assert (made["name"], made["labels"]) == ("of-s1", {"sku": "x"})
    got = queueing_pb2.GetSubscriptionRequest(subscription="sub-x")
    assert (await world.queueing.GetSubscription(got)).topic == "of-s1"
    gone = world.queueing.GetTopic(queueing_pb2.GetTopicRequest(topic="of-s1"))
    assert (await refused(gone))[0] == "NOT_FOUND"


async def test_a_method_that_knows_request_ids_does_its_work_once(world: World) -> None:
    """A saga that starts a saga: each attempt has the same request id."""
    await world.define({"name": "wait", "action": {"topic": "nowhere"}}, name="inner")
    await world.define({"name": "start", "action": rpc("queueing/StartSaga", definition="inner")})
    await world.start("s1")
    await world.reaches("s1")
    inner = sagas_pb2.ListSagasRequest(definition="inner")
    (one,) = (await world.sagas.ListSagas(inner)).sagas
    driven = await world.store.get("s1")
    assert driven.results["start"]["id"] == one.id


async def test_a_method_that_is_no_more_fails_its_step(world: World) -> None:
    """Defined by another version of the service, which checks nothing here."""
    gone = Step("a", Action(method="queueing/Gone"), Action(method="queueing/Gone"))
    await world.store.create_definition(Definition("order", (gone,)))
    await world.start("s1")
    saga = await world.reaches("s1")
    assert (saga.state, saga.error_code) == (sagas_pb2.SAGA_STATE_COMPENSATED, "UNIMPLEMENTED")


async def test_an_error_of_a_method_decides_whether_it_is_undone(world: World) -> None:
    undo = rpc("queueing/DeleteTopic", topic="work.reserve")
    await world.define(
        {"name": "a", "action": rpc("queueing/CreateTopic", topic="work.reserve"), "compensation": undo}
    )
    await world.start("s1")
    saga = await world.reaches("s1")
    assert (saga.state, saga.error_code) == (sagas_pb2.SAGA_STATE_COMPENSATED, "ALREADY_EXISTS")
    assert saga.steps[0].compensation_attempts == 0
    await world.queueing.GetTopic(queueing_pb2.GetTopicRequest(topic="work.reserve"))


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


async def test_a_repeated_request_starts_one_saga_and_an_id_is_of_one(world: World) -> None:
    await world.define(RESERVE)
    first = await world.start(requestId="r1")
    assert (await world.start(requestId="r1")).id == first.id
    assert await refused(world.start(requestId="r1", input={"sku": 8})) == (
        "INVALID_ARGUMENT",
        "REQUEST_ID_REUSED",
    )
    await world.start("s1")
    assert await refused(world.start("s1")) == ("ALREADY_EXISTS", "SAGA_EXISTS")
    assert await refused_field(world.start("no spaces")) == "id"
    assert await refused_field(world.start(requestId="x" * 129)) == "request_id"
    assert await refused_field(world.start(input={"x": "y" * 300_000})) == "input"
    assert (await refused(world.start(definition="other")))[1] == "SAGA_DEFINITION_NOT_FOUND"
    for call in (world.get("none"), world.events("none")):
        assert await refused(call) == ("NOT_FOUND", "SAGA_NOT_FOUND")


async def test_no_more_run_than_may(world: World) -> None:
    await world.define(RESERVE)
    await asyncio.gather(*(world.start() for _ in range(20)))
    assert await refused(world.start()) == ("RESOURCE_EXHAUSTED", "TOO_MANY_SAGAS")


async def test_sagas_are_listed_in_pages(world: World) -> None:
    await world.define(RESERVE)
    for number in range(5):
        await world.start(f"s{number}")
    seen, token = [], ""
    while True:
        page = await world.sagas.ListSagas(sagas_pb2.ListSagasRequest(page_size=2, page_token=token))
        seen += [saga.id for saga in page.sagas]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["s4", "s3", "s2", "s1", "s0"]
    foreign = (await world.sagas.ListSagas(sagas_pb2.ListSagasRequest(page_size=2))).next_page_token
    mixed = world.sagas.ListSagas(sagas_pb2.ListSagasRequest(definition="order", page_token=foreign))
    assert (await refused(mixed))[1] == "INVALID_PAGE_TOKEN"
    events = await world.sagas.ListSagaEvents(sagas_pb2.ListSagaEventsRequest(saga="s1", page_size=1))
    rest = await world.sagas.ListSagaEvents(
        sagas_pb2.ListSagaEventsRequest(saga="s1", page_token=events.next_page_token)
    )
    assert [told(each) for each in (*events.events, *rest.events)] == ["started", "reserve attempt_started"]


# Leases.


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


async def test_a_driver_that_stops_in_order_leaves_its_sagas_to_others_at_once(world: EdgeWorld) -> None:
    await waiting_call(world)
    world.driving.cancel()
    await asyncio.gather(world.driving, return_exceptions=True)
    assert (await _lease(world))[0] == ""
    assert (await world.get("s1")).state == sagas_pb2.SAGA_STATE_RUNNING


# Watching.


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


async def test_a_watcher_of_a_silent_saga_gets_signs_of_life_until_the_service_stops(world: World) -> None:
    await world.define(RESERVE)
    saga = await world.start("s1")
    watched = watch(world.store, world.changes, "s1", saga.revision, poll_s=0.05, alive_s=0.1)
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
