"""Definitions that could not run, and the references in requests."""

from __future__ import annotations

from typing import Any

import pytest

from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.templates import MissingValueError, filled
from services.runtime.errors import InvalidArgumentError

TOPIC = Action("work")


def rpc(request: dict[str, Any]) -> Action:
    return Action(method="storage/CreateBucket", request=request)


@pytest.mark.parametrize(
    ("steps", "field", "reason"),
    [
        ((), "definition.steps", "INVALID_ARGUMENT"),
        (tuple(Step(f"s{n}", TOPIC) for n in range(65)), "definition.steps", "INVALID_ARGUMENT"),
        ((Step("a", TOPIC), Step("a", TOPIC)), "definition.steps[1].name", "DUPLICATE_STEP"),
        ((Step("a.b", TOPIC),), "definition.steps[0].name", "INVALID_ARGUMENT"),
        ((Step("", TOPIC),), "definition.steps[0].name", "INVALID_ARGUMENT"),
        ((Step("a", Action()),), "definition.steps[0].action", "INVALID_ARGUMENT"),
        ((Step("a", Action("bad topic")),), "definition.steps[0].action.topic", "INVALID_ARGUMENT"),
        ((Step("a", Action(method="Create")),), "definition.steps[0].action.rpc.method", "UNKNOWN_RPC"),
        ((Step("a", Action("work", timeout_s=0)),), "definition.steps[0].action.timeout", "INVALID_ARGUMENT"),
        (
            (Step("a", TOPIC, Action("undo", timeout_s=1e6)),),
            "definition.steps[0].compensation.timeout",
            "INVALID_ARGUMENT",
        ),
        (
            (Step("a", rpc({"x": ["${results.b.id}"]})), Step("b", TOPIC)),
            "definition.steps[0].action.rpc.request.x[0]",
            "UNKNOWN_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${results.a}"})),),
            "definition.steps[0].action.rpc.request.x",
            "UNKNOWN_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${results}"})),),
            "definition.steps[0].action.rpc.request.x",
            "INVALID_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${env.x}"})),),
            "definition.steps[0].action.rpc.request.x",
            "INVALID_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${saga.y}"})),),
            "definition.steps[0].action.rpc.request.x",
            "INVALID_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${input"})),),
            "definition.steps[0].action.rpc.request.x",
            "INVALID_REFERENCE",
        ),
        (
            (Step("a", rpc({"x": "${input..a}"})),),
            "definition.steps[0].action.rpc.request.x",
            "INVALID_REFERENCE",
        ),
        ((Step("a", rpc({"x": "5 $"})),), "definition.steps[0].action.rpc.request.x", "INVALID_REFERENCE"),
    ],
)
def test_a_definition_that_could_not_run_is_refused(steps: tuple[Step, ...], field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Definition("order", steps).check()
    assert (caught.value.violations[0].field, caught.value.reason) == (field, reason)


def test_a_request_that_is_nested_too_deeply_is_refused() -> None:
    nested: Any = "x"
    for _ in range(40):
        nested = [nested]
    with pytest.raises(InvalidArgumentError):
        Definition("order", (Step("a", rpc({"x": nested})),)).check()


def test_a_compensation_may_refer_to_its_own_step() -> None:
    Definition("order", (Step("a", rpc({}), rpc({"id": "${results.a.id}"})),)).check()


VALUES = {
    "saga": {"id": "s1"},
    "input": {"n": 3, "user": {"name": "Åse"}, "list": ["x", "y"]},
    "results": {"reserve": {"id": 1.5, "none": None}},
}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("${saga.id}", "s1"),
        ("${input.n}", 3),
        ("${input}", VALUES["input"]),
        ("${input.list.1}", "y"),
        ("${results.reserve.none}", None),
        (
            "${input.user.name} has ${input.n}, ${results.reserve.id} and ${input.list}",
            'Åse has 3, 1.5 and ["x", "y"]',
        ),
        ("$${input.n} costs $$5", "${input.n} costs $5"),
        ("$$", "$"),
        ({"a": ["${input.n}", 4, True, None]}, {"a": [3, 4, True, None]}),
    ],
)
def test_references_become_values(template: object, value: object) -> None:
    assert filled(template, VALUES) == value


@pytest.mark.parametrize("text", ["${input.m}", "${results.charge.id}", "${input.list.2}", "a ${input.n.m}"])
def test_a_value_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(MissingValueError, match=r"\$\{.*\}: there is no such value"):
        filled(text, VALUES)
