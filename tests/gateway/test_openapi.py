"""The OpenAPI document: complete against the protos, and made the same each time."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.api import annotations_pb2

from plexus.options.v1 import options_pb2
from services.gateway import kong
from services.gateway.envoy.descriptors import plexus_files
from services.runtime.config import project_file


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(project_file("generated/openapi/plexus.openapi.json").read_text())


def _rules() -> list[tuple[Any, str, str]]:
    found = []
    for file in plexus_files():
        for service in file.services_by_name.values():
            for method in service.methods:
                options = method.GetOptions()
                if options.HasExtension(annotations_pb2.http):
                    rule = options.Extensions[annotations_pb2.http]
                    for one in (rule, *rule.additional_bindings):
                        verb = one.WhichOneof("pattern")
                        custom = verb == "custom"
                        path = one.custom.path if custom else getattr(one, verb)
                        found.append((method, one.custom.kind.lower() if custom else verb, path))
    return found


def test_every_binding_is_described_with_its_groups(document: Any) -> None:
    rules = _rules()
    assert rules
    for method, verb, path in rules:
        operation = document["paths"][re.sub(r"=[^}]*}", "}", path)][verb]
        assert operation["summary"], method.full_name
        access = method.GetOptions().Extensions[options_pb2.access]
        assert operation.get("x-plexus-groups", []) == list(access.groups)
        assert (operation.get("security") == []) == access.anonymous


def test_every_reference_resolves(document: Any) -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])


def test_every_binding_is_reachable_through_kong_yml() -> None:
    routes = list(kong.load(project_file("gateway/kong.yml")).routes())
    for method, _, path in _rules():
        concrete = re.sub(r"\{[^}]*}", "x", path)
        area = method.containing_service.full_name.split(".")[1]
        matching = [r for r in routes if any(re.match(p[1:], concrete) for p in r.route.paths)]
        assert matching, path
        assert matching[0].service.mesh_service == area, path
        grpc_path = f"/{method.containing_service.full_name}/{method.name}"
        native = [r for r in routes if any(re.match(p[1:], grpc_path) for p in r.route.paths)]
        assert [r.service.mesh_service for r in native] == [area]
