"""OpenAPI 3.1 from the protos: google.api.http gives paths, comments texts, the access option groups.

    python -m services.gateway.openapi DESCRIPTORS_BINPB OUTDIR

DESCRIPTORS_BINPB is a FileDescriptorSet with imports and source info; OUTDIR gets plexus.openapi.json,
the same bytes for the same input.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2

from plexus.options.v1 import options_pb2
from services.gateway.openapi_schemas import HTTP_BODY, Json, Schemas

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "plexus.openapi.json"
_VARIABLE = re.compile(r"\{([a-z0-9_.]+)(?:=([^}]*))?\}")
_METHODS = ("get", "put", "post", "delete", "patch")
_INTRODUCTION = (
    "Every request carries `Authorization: Bearer <token>`; `plexus token --consumer NAME` makes one. "
    "Refusals of every kind are a google.rpc.Status: code, message, details. 429 and some 503 carry "
    "Retry-After. A call that streams typed messages answers with server-sent events, one JSON message in "
    "each `data:` line."
)


@dataclass(frozen=True, slots=True)
class _Binding:
    method: str
    path: str
    body: str


def generate(descriptors: descriptor_pb2.FileDescriptorSet) -> Json:
    """The OpenAPI document of every method with a REST binding."""
    schemas = Schemas(descriptors)
    paths: dict[str, Json] = {}
    tags: list[Json] = []
    for file in sorted(descriptors.file, key=lambda item: item.name):
        if not file.package.startswith("plexus."):
            continue
        for index, service in enumerate(file.service):
            bound = False
            for number, method in enumerate(service.method):
                for position, binding in enumerate(_bindings(method)):
                    bound = True
                    comment = schemas.comment(file.name, (6, index, 2, number))
                    operation = _operation(schemas, service.name, method, binding, comment)
                    if position:
                        operation["operationId"] += f"_{position + 1}"
                    paths.setdefault(_openapi_path(binding.path), {})[binding.method] = operation
            if bound:
                tags.append(
                    {"name": _tag(service.name), "description": schemas.comment(file.name, (6, index))}
                )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Plexus", "version": "1", "description": _INTRODUCTION},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": tags,
        "paths": {path: paths[path] for path in sorted(paths)},
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": schemas.collected(),
        },
    }


def _bindings(method: descriptor_pb2.MethodDescriptorProto) -> Iterator[_Binding]:
    if not method.options.HasExtension(annotations_pb2.http):
        return
    rule = method.options.Extensions[annotations_pb2.http]
    for one in (rule, *rule.additional_bindings):
        yield _binding(one)


def _binding(rule: http_pb2.HttpRule) -> _Binding:
    for method in _METHODS:
        path = getattr(rule, method)
        if path:
            return _Binding(method, path, rule.body)
    return _Binding(rule.custom.kind.lower(), rule.custom.path, rule.body)


def _openapi_path(path: str) -> str:
    return _VARIABLE.sub(lambda match: "{" + match.group(1) + "}", path)


def _tag(service: str) -> str:
    return service.removesuffix("Service")


def _operation(
    schemas: Schemas,
    service: str,
    method: descriptor_pb2.MethodDescriptorProto,
    binding: _Binding,
    comment: str,
) -> Json:
    summary, _, rest = comment.partition("\n\n")
    access = method.options.Extensions[options_pb2.access]
    operation: Json = {
        "operationId": f"{service}_{method.name}",
        "tags": [_tag(service)],
        "summary": " ".join(summary.split()),
    }
    if rest:
        operation["description"] = rest
    if access.anonymous:
        operation["security"] = []
    elif access.groups:
        operation["x-plexus-groups"] = list(access.groups)
    in_path = _VARIABLE.findall(binding.path)
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            **({"description": "May contain slashes."} if "**" in pattern else {}),
            "schema": schemas.path_field(method.input_type, name),
        }
        for name, pattern in in_path
    ]
    names = {name for name, _ in in_path}
    if binding.body != "*" and method.input_type != HTTP_BODY:
        parameters += schemas.query(method.input_type, skip=names | {binding.body})
    if parameters:
        operation["parameters"] = parameters
    if binding.body:
        operation["requestBody"] = {
            "required": True,
            "content": schemas.body(method.input_type, binding.body, skip=names),
        }
    operation["responses"] = {
        "200": {
            "description": "Success.",
            "content": schemas.answer(method.output_type, streamed=method.server_streaming),
        },
        "default": {
            "description": "A refusal.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        },
    }
    return operation


def main(arguments: list[str]) -> None:
    """Read the descriptor set, write the document."""
    source, target = map(Path, arguments)
    document = generate(descriptor_pb2.FileDescriptorSet.FromString(source.read_bytes()))
    text: Any = json.dumps(document, indent=1, ensure_ascii=False)
    (target / FILE).write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
