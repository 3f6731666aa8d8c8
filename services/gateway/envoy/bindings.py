"""Which REST requests are which gRPC method, as Envoy can match them before they are translated."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from google.api import annotations_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.api import http_pb2
    from google.protobuf.descriptor import FileDescriptor

Bindings = dict[str, list[tuple[str, str]]]
"""By gRPC path: HTTP verbs and regular expressions of the whole path with its query."""

_PART = re.compile(r"\{[^}=]*(?:=([^}]*))?\}|\*\*|\*|[^{*]+")
_VERBS = ("get", "put", "post", "delete", "patch")


def bindings(files: Iterable[FileDescriptor]) -> Mapping[str, list[tuple[str, str]]]:
    """The bindings of all methods that have any."""
    found: Bindings = {}
    for file in files:
        for service in file.services_by_name.values():
            for method in service.methods:
                options = method.GetOptions()
                if options.HasExtension(annotations_pb2.http):
                    rule = options.Extensions[annotations_pb2.http]
                    rules = (rule, *rule.additional_bindings)
                    found[f"/{service.full_name}/{method.name}"] = [_binding(each) for each in rules]
    return found


def _binding(rule: http_pb2.HttpRule) -> tuple[str, str]:
    for verb in _VERBS:
        path = getattr(rule, verb)
        if path:
            return verb.upper(), _regex(path)
    return rule.custom.kind, _regex(rule.custom.path)


def _regex(template: str) -> str:
    """A path template of google.api.http as a regular expression in RE2's syntax."""
    return f"{_pattern(template)}(?:\\?.*)?"


def _pattern(template: str) -> str:
    made = []
    for part in _PART.finditer(template):
        text = part.group()
        if text.startswith("{"):
            made.append(_pattern(part.group(1) or "*"))
        else:
            made.append({"*": "[^/?]+", "**": "[^?]*"}.get(text) or re.escape(text))
    return "".join(made)
