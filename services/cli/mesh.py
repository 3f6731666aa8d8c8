"""The control plane asked from the command line."""

from __future__ import annotations

import asyncio
import difflib
import os
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import json_format

from plexus.client.channel import Mesh
from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from services.runtime.config import project_file
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from google.protobuf.message import Message

T = TypeVar("T", bound="Message")

_TIMEOUT_S = 15.0
_BOOTSTRAP = "GRPC_XDS_BOOTSTRAP"
CHANGES = {
    mesh_pb2.CHANGE_ADDED: "added",
    mesh_pb2.CHANGE_CHANGED: "changed",
    mesh_pb2.CHANGE_UNCHANGED: "unchanged",
    mesh_pb2.CHANGE_REMOVED: "removed",
}


def as_json(message: Message) -> Any:
    """A message as plain data, with every field."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _asked(state_dir: Path, method: str, request: Message, answer: type[T]) -> T:
    """Ask the control plane that runs on a state folder, or the one that the xDS bootstrap names.

    Args:
        state_dir: The state folder.
        method: Of MeshService.
        request: Its request.
        answer: Class of its response.

    Raises:
        UnavailableError: None answers.
        PlexusError: What it answers.
    """
    if not os.environ.get(_BOOTSTRAP):
        bootstrap = state_dir / "identities" / "cli" / "bootstrap.json"
        if not bootstrap.is_file():
            raise UnavailableError("no control plane has run here: start it with `plexus up`")
        os.environ[_BOOTSTRAP] = str(bootstrap)

    async def run() -> T:
        async with Mesh() as mesh:
            channel = cast("grpc.aio.Channel", mesh.channel("control"))
            call = getattr(mesh_pb2_grpc.MeshServiceStub(channel), method)
            response = await call(request, timeout=_TIMEOUT_S)
            if not isinstance(response, answer):
                raise TypeError(f"{method} answered {type(response).__name__}")
            return response

    try:
        return asyncio.run(run())
    except grpc.aio.AioRpcError as error:
        if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
            raise UnavailableError(
                "the control plane does not answer: see `plexus status`", dependency="control"
            ) from error
        raise from_rpc_error(error, dependency="control") from error


def files(paths: Sequence[Path]) -> list[mesh_pb2.ApplyPoliciesRequest.Document]:
    """The policy files among paths: files, and those ending in .yaml inside folders.

    Raises:
        NotFoundError: There is none.
    """
    found: list[Path] = []
    for path in paths or [project_file("consul/policies")]:
        found += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not found:
        raise NotFoundError(f"no policy files (*.yaml) in {', '.join(map(str, paths))}")
    return [
        mesh_pb2.ApplyPoliciesRequest.Document(
            service=path.stem, origin=str(path), text=path.read_text(encoding="utf-8")
        )
        for path in found
    ]


def apply(
    state_dir: Path, paths: Sequence[Path], remove: Sequence[str], *, dry_run: bool
) -> mesh_pb2.ApplyPoliciesResponse:
    """Write policies.

    Raises:
        InvalidArgumentError: One is at fault; the text says file, line and reason, a problem a line.
    """
    documents = files(paths) if paths or not remove else []
    request = mesh_pb2.ApplyPoliciesRequest(documents=documents, remove=remove, validate_only=dry_run)
    return _asked(state_dir, "ApplyPolicies", request, mesh_pb2.ApplyPoliciesResponse)


def policies(state_dir: Path, service: str = "") -> mesh_pb2.ListPoliciesResponse:
    """The policies in force, and those refused."""
    request = mesh_pb2.ListPoliciesRequest(service=service)
    return _asked(state_dir, "ListPolicies", request, mesh_pb2.ListPoliciesResponse)


def diff(state_dir: Path, paths: Sequence[Path]) -> list[str]:
    """How files differ from what is in force, as lines of a unified diff."""
    in_force = {policy.service: policy for policy in policies(state_dir).policies}
    lines: list[str] = []
    for document in files(paths):
        present = in_force.get(document.service, mesh_pb2.Policy())
        lines += difflib.unified_diff(
            present.text.splitlines(),
            document.text.splitlines(),
            present.origin or "(none)",
            document.origin,
            lineterm="",
        )
    return lines


def intentions(state_dir: Path) -> mesh_pb2.ListIntentionsResponse:
    """Who may call whom."""
    request = mesh_pb2.ListIntentionsRequest()
    return _asked(state_dir, "ListIntentions", request, mesh_pb2.ListIntentionsResponse)


def graph(state_dir: Path) -> mesh_pb2.Graph:
    """Services and who follows them."""
    return _asked(state_dir, "GetGraph", mesh_pb2.GetGraphRequest(), mesh_pb2.Graph)


def clients(state_dir: Path) -> mesh_pb2.ListClientsResponse:
    """The connected clients."""
    request = mesh_pb2.ListClientsRequest()
    return _asked(state_dir, "ListClients", request, mesh_pb2.ListClientsResponse)


def explain(state_dir: Path, service: str) -> mesh_pb2.Explanation:
    """Everything about one service.

    Raises:
        InvalidArgumentError: It is no service's name.
    """
    if not service:
        raise InvalidArgumentError("must be a service's name", field="service")
    request = mesh_pb2.ExplainServiceRequest(service=service)
    return _asked(state_dir, "ExplainService", request, mesh_pb2.Explanation)
