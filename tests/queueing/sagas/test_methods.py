"""Steps that call methods of the mesh."""

from __future__ import annotations

from google.protobuf import json_format

from plexus.queueing.v1 import queueing_pb2, sagas_pb2
from services.queueing.sagas.definitions import Action, Definition, Step
from tests.queueing.sagas.world import World, refused, rpc


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


async def test_a_field_that_a_method_refuses_is_named(world: World) -> None:
    await world.define({"name": "a", "action": rpc("queueing/CreateTopic", topic="${input.topic}")})
    await world.start("s1", input={"topic": "no topic"})
    assert (await world.reaches("s1")).error.startswith("topic: ")


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
