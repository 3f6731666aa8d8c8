"""Consul's precedence and default deny; the shipped intentions."""

from __future__ import annotations

import pytest
import yaml

from services.mesh.intention_files import IntentionFiles
from services.mesh.intentions import IntentionTable, ServiceIntentions
from services.runtime.config import project_file


def table(text: str) -> IntentionTable:
    return IntentionTable.of(ServiceIntentions.model_validate(entry) for entry in yaml.safe_load_all(text))


RULES = """
Kind: service-intentions
Name: pay
Sources:
  - {Name: web, Action: allow}
  - Name: batch
    Permissions:
      - {Action: deny, HTTP: {PathExact: /pay.Pay/Refund}}
      - {Action: allow, HTTP: {PathPrefix: /pay.Pay/}}
  - {Name: "*", Action: deny}
---
Kind: service-intentions
Name: "*"
Sources:
  - {Name: monitor, Action: allow}
"""


@pytest.mark.parametrize(
    ("source", "destination", "path", "allowed", "rule"),
    [
        ("web", "pay", "/pay.Pay/Charge", True, "web -> pay"),
        ("batch", "pay", "/pay.Pay/Refund", False, "batch -> pay [0]"),
        ("batch", "pay", "/pay.Pay/Charge", True, "batch -> pay [1]"),
        ("batch", "pay", "/other.X/Y", False, "batch -> pay (no permission matches)"),
        ("monitor", "pay", "/pay.Pay/Charge", False, "* -> pay"),
        ("monitor", "orders", "/o.O/List", True, "monitor -> *"),
        ("web", "orders", "/o.O/List", False, "default deny"),
    ],
)
def test_the_most_specific_rule_decides(
    source: str, destination: str, path: str, allowed: bool, rule: str
) -> None:
    decision = table(RULES).decide(source, destination, path)
    assert (decision.allowed, decision.rule) == (allowed, rule)


def test_a_regex_must_match_the_whole_path() -> None:
    rules = table(
        "{Kind: service-intentions, Name: a, Sources: [{Name: b, Permissions:"
        " [{Action: allow, HTTP: {PathRegex: '/a.A/Get.*'}}]}]}"
    )
    assert rules.decide("b", "a", "/a.A/GetIt").allowed
    assert not rules.decide("b", "a", "/x/a.A/GetIt").allowed


async def shipped_rules() -> IntentionTable:
    return IntentionTable.of(await IntentionFiles(project_file("consul/intentions")).good())


async def test_shipped_intentions_let_the_edge_in_and_nobody_else_but_the_named() -> None:
    shipped = await shipped_rules()
    for service in ("vectors", "storage", "search", "inference", "queueing", "knowledge"):
        assert shipped.decide("edge", service, "/x/y").allowed
        assert not shipped.decide("stranger", service, "/x/y").allowed
    assert not shipped.decide("storage", "vectors", "/x/y").allowed
    assert shipped.decide("knowledge", "vectors", "/x/y").allowed


async def test_the_control_plane_may_ask_for_health_and_nothing_else() -> None:
    shipped = await shipped_rules()
    assert shipped.decide("control", "vectors", "/grpc.health.v1.Health/Check").allowed
    assert not shipped.decide("control", "vectors", "/plexus.vectors.v1.VectorsService/Search").allowed
