"""The descriptor set that the transcoder works from, out of the generated Python modules."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2

import plexus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor


def plexus_files() -> list[FileDescriptor]:
    """Every generated file of the `plexus` packages, by name."""
    found: dict[str, FileDescriptor] = {}
    # Not pkgutil: the generated folders are namespace packages, which it does not list.
    for base in plexus.__path__:
        for module in sorted(Path(base).glob("*/v1/*_pb2.py")):
            name = f"plexus.{module.parent.parent.name}.v1.{module.stem}"
            file: FileDescriptor = importlib.import_module(name).DESCRIPTOR
            found[file.name] = file
    return [found[name] for name in sorted(found)]


def transcoded(files: Iterable[FileDescriptor]) -> tuple[bytes, tuple[str, ...]]:
    """The transcoder's input.

    Returns:
        The serialized FileDescriptorSet (with google.rpc's error details, or the bodies of errors would be
        empty), and the full names of the services with at least one REST binding.
    """
    ordered: dict[str, FileDescriptor] = {}
    services: list[str] = []

    def add(file: FileDescriptor) -> None:
        if file.name not in ordered:
            for dependency in file.dependencies:
                add(dependency)
            ordered[file.name] = file

    add(error_details_pb2.DESCRIPTOR)
    for file in files:
        add(file)
        services += [service.full_name for service in file.services_by_name.values() if _has_rest(service)]
    result = descriptor_pb2.FileDescriptorSet()
    for file in ordered.values():
        file.CopyToProto(result.file.add())
    return result.SerializeToString(deterministic=True), tuple(sorted(services))


def _has_rest(service: ServiceDescriptor) -> bool:
    return any(method.GetOptions().HasExtension(annotations_pb2.http) for method in service.methods)
