"""The control plane asked from the command line."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import json_format

from plexus.client.channel import Mesh
from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from services.mesh import intention_files
from services.mesh.intention_store import compared
from services.mesh.policy.domain import Document
from services.runtime.config import project_file
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

T = TypeVar("T", bound="Message")

_TIMEOUT_S = 15.0
_SHIPPED = ("consul/policies", "consul/intentions")
_KIND = re.compile(r"^Kind[ \t]*:", re.MULTILINE)
"""What every service-intentions entry has, and no policy."""
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


@dataclass(frozen=True, slots=True)
class Files:
    """Files of both kinds.

    Attributes:
        policies: Traffic policies, by the name of the file.
        intentions: Service-intentions.
    """

    policies: list[mesh_pb2.ApplyPoliciesRequest.Document]
    intentions: list[mesh_pb2.ApplyIntentionsRequest.Document]


def files(paths: Sequence[Path]) -> Files:
    """Policies and intentions among paths: files, and those ending in .yaml inside folders.

    Raises:
        NotFoundError: There is none, or not what is named.
    """
    found: list[Path] = []
    for path in paths or [project_file(folder) for folder in _SHIPPED]:
        found += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not found:
        raise NotFoundError(f"no policies or intentions (*.yaml) in {', '.join(map(str, paths))}")
    among = Files([], [])
    for path in found:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text in UTF-8"
            raise NotFoundError(f"{path}: {reason}") from error
        if _KIND.search(text):
            among.intentions.append(mesh_pb2.ApplyIntentionsRequest.Document(origin=str(path), text=text))
        else:
            among.policies.append(
                mesh_pb2.ApplyPoliciesRequest.Document(service=path.stem, origin=str(path), text=text)
            )
    return among


@dataclass(frozen=True, slots=True)
class Removed:
    """What is taken out of force: policies by service, intentions by destination."""

    policies: Sequence[str] = ()
    intentions: Sequence[str] = ()


def apply(
    state_dir: Path, paths: Sequence[Path], removed: Removed, *, dry_run: bool
) -> tuple[mesh_pb2.ApplyPoliciesResponse, mesh_pb2.ApplyIntentionsResponse]:
    """Write policies and intentions; nothing of either while one of both is at fault.

    Raises:
        InvalidArgumentError: One is at fault; the text says file, line and reason, a problem a line.
    """
    found = files(paths) if paths or not (removed.policies or removed.intentions) else Files([], [])
    policies_request = mesh_pb2.ApplyPoliciesRequest(documents=found.policies, remove=removed.policies)
    intentions_request = mesh_pb2.ApplyIntentionsRequest(
        documents=found.intentions, remove=removed.intentions
    )
    some_policies = bool(found.policies or removed.policies)
    some_intentions = bool(found.intentions or removed.intentions)
    answer = mesh_pb2.ApplyPoliciesResponse(), mesh_pb2.ApplyIntentionsResponse()
    # Once to check, and once to write: they are kept in two places.
    for checking in [True] if dry_run else [True, False]:
        policies_request.validate_only = intentions_request.validate_only = checking
        policies_answer, intentions_answer = answer
        if some_policies:
            policies_answer = _asked(
                state_dir, "ApplyPolicies", policies_request, mesh_pb2.ApplyPoliciesResponse
            )
        if some_intentions:
            intentions_answer = _asked(
                state_dir, "ApplyIntentions", intentions_request, mesh_pb2.ApplyIntentionsResponse
            )
        answer = policies_answer, intentions_answer
    return answer


def policies(state_dir: Path, service: str = "") -> mesh_pb2.ListPoliciesResponse:
    """The policies in force, and those refused."""
    request = mesh_pb2.ListPoliciesRequest(service=service)
    return _asked(state_dir, "ListPolicies", request, mesh_pb2.ListPoliciesResponse)


def diff(state_dir: Path, paths: Sequence[Path]) -> list[str]:
    """How files differ from what is in force, as lines of a unified diff.

    Intentions are compared by what they say, in one form: Consul keeps neither comments nor order.

    Raises:
        InvalidArgumentError: A file of intentions is at fault; the text says file, line and reason.
    """
    found = files(paths)
    lines: list[str] = []
    if found.policies:
        in_force = {policy.service: policy for policy in policies(state_dir).policies}
        for document in found.policies:
            policy = in_force.get(document.service, mesh_pb2.Policy())
            lines += _differences(policy.text, document.text, policy.origin, document.origin)
    if found.intentions:
        kept = {each.destination: each for each in intentions(state_dir).documents if each.text}
        for entry in found.intentions:
            to = intention_files.parse(Document(entry.origin, entry.text)).Name
            present = kept.get(to, mesh_pb2.IntentionDocument())
            before, after = compared(present.text) if present.text else "", compared(entry.text)
            lines += _differences(before, after, present.origin, entry.origin)
    return lines


def _differences(before: str, after: str, origin: str, file: str) -> Iterator[str]:
    return difflib.unified_diff(
        before.splitlines(), after.splitlines(), origin or "(none)", file, lineterm=""
    )


def intentions(state_dir: Path) -> mesh_pb2.ListIntentionsResponse:
    """Who may call whom."""
    request = mesh_pb2.ListIntentionsRequest()
    return _asked(state_dir, "ListIntentions", request, mesh_pb2.ListIntentionsResponse)


def intention_documents(state_dir: Path, destination: str = "") -> list[mesh_pb2.IntentionDocument]:
    """The texts of intentions, of one destination or of all."""
    documents = intentions(state_dir).documents
    return [each for each in documents if not destination or each.destination == destination]


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
