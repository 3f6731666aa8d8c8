"""Compare our declared part of the xDS API with the official classes; needs xds-protos.

Usage: official_xds.py XDS_PROTO DESCRIPTORS RESOURCES

The official distribution overwrites files of other packages, so this runs in an environment of its own,
without Plexus. DESCRIPTORS is a FileDescriptorSet of our proto, RESOURCES a DiscoveryResponse with resources
that use all of it. Prints one problem a line, and nothing when there is none.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields

SKIPPED_ENUM_VALUES = re.compile(r"UNSPECIFIED$")
MODULES = """
envoy.config.cluster.v3.cluster envoy.config.endpoint.v3.endpoint envoy.config.listener.v3.listener
envoy.config.route.v3.route envoy.extensions.filters.http.fault.v3.fault
envoy.extensions.filters.http.router.v3.router envoy.service.discovery.v3.discovery
envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager
envoy.extensions.transport_sockets.tls.v3.tls
"""


def official_names(text: str) -> dict[str, str]:
    """Our message or enum -> the official full name, which begins its comment."""
    pattern = re.compile(
        r"^// (envoy\.[\w.]+?)[.,](?: [^\n]*)?\n(?://[^\n]*\n)*(?:message|enum) (\w+)", re.MULTILINE
    )
    return {ours: theirs for theirs, ours in pattern.findall(text)}


def field_problem(field: descriptor_pb2.FieldDescriptorProto, official: Any, names: dict[str, str]) -> str:
    """How a field differs from the official one of its number; empty if it does not."""
    if official is None or official.name != field.name:
        return f"official number {field.number} is {official and official.name}"
    if official.type != field.type:
        return f"type {field.type}, official {official.type}"
    if official.is_repeated != (field.label == field.LABEL_REPEATED):
        return "repeated in one only"
    if official.message_type is not None and not official.message_type.GetOptions().map_entry:
        target = field.type_name.removeprefix(".")
        expected = names.get(target.removeprefix("plexus.xds.v1."), target)
        if official.message_type.full_name != expected:
            return f"{expected}, official {official.message_type.full_name}"
    return ""


def problems(text: str, ours: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Every field that is not exactly the official one."""
    pool = descriptor_pool.Default()
    names = official_names(text)
    found = []
    for message in ours.message_type:
        theirs_name = names.get(message.name)
        if theirs_name is None:
            found.append(f"{message.name}: its comment does not begin with the official name")
            continue
        theirs = pool.FindMessageTypeByName(theirs_name)
        for field in message.field:
            official = theirs.fields_by_number.get(field.number)
            reason = field_problem(field, official, names)
            if reason:
                found.append(f"{message.name}.{field.name}: {reason}")
    for enum in ours.enum_type:
        official_enum = pool.FindEnumTypeByName(names[enum.name])
        for value in enum.value:
            their_value = official_enum.values_by_number.get(value.number)
            same = their_value is not None and value.name.endswith(their_value.name)
            if not same and not SKIPPED_ENUM_VALUES.search(value.name):
                found.append(f"{enum.name}.{value.name}: official {their_value and their_value.name}")
    return found


def unknown(message: Any, path: str) -> list[str]:
    """Everything that the official class does not know, inside Any too."""
    if message.DESCRIPTOR.full_name == "google.protobuf.Any":
        inner_type = descriptor_pool.Default().FindMessageTypeByName(message.type_url.rpartition("/")[2])
        inner = message_factory.GetMessageClass(inner_type).FromString(message.value)
        return unknown(inner, f"{path}<{inner_type.name}>")
    found = [f"{path}: field {field.field_number}" for field in list(unknown_fields.UnknownFieldSet(message))]  # type: ignore[call-overload]
    for field, value in message.ListFields():
        where = f"{path}.{field.name}"
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            entries = [value[key] for key in value]
        else:
            entries = list(value) if field.is_repeated else [value]
        for entry in entries:
            found += unknown(entry, where)
    return found


def main() -> int:
    """Compare; the exit code is 1 when something differs."""
    proto, descriptors, resources = map(Path, sys.argv[1:])
    for module in MODULES.split():
        importlib.import_module(f"{module}_pb2")
    discovery = importlib.import_module("envoy.service.discovery.v3.discovery_pb2")
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    found = []
    for file in files.file:
        found += problems((proto.parent / Path(file.name).name).read_text(), file)
    response = discovery.DiscoveryResponse.FromString(resources.read_bytes())
    if not response.resources:
        found.append("no resources given")
    found += unknown(response, "response")
    sys.stdout.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
