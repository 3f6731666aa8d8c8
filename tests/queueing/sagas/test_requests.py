"""What SagaService makes, refuses and lists: definitions, and sagas before they run."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc.aio
import pytest

from plexus.queueing.v1 import sagas_pb2, sagas_pb2_grpc
from tests.contracts import hostile
from tests.queueing.sagas.world import (
    CHARGE,
    RESERVE,
    World,
    definition,
    refused,
    refused_field,
    rpc,
    told,
    topic,
)


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


async def test_a_saga_gives_nobody_rights_that_he_has_not(world: World) -> None:
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


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(world: World) -> None:
    async def restore() -> None:
        with suppress(grpc.aio.AioRpcError):
            await world.define(RESERVE)
        with suppress(grpc.aio.AioRpcError):
            await world.start("s")

    await restore()
    names = {"definition": "order", "saga": "s"}
    bases = {
        f"{verb}SagaDefinition": {"definition": {"name": name, "steps": [RESERVE, CHARGE]}}
        for verb, name in (("Create", "new"), ("Update", "order"))
    }
    service = sagas_pb2.DESCRIPTOR.services_by_name["SagaService"]
    await hostile.probe(world.sagas, service, names, bases, restore, ("WatchSaga",))
