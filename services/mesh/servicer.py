"""MeshService: what the control plane knows, and policies and intentions taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from services.mesh import convert, departure, intention_files
from services.mesh.intention_store import compared
from services.mesh.intentions import WILDCARD
from services.mesh.policy.domain import Document, PolicyError
from services.mesh.policy.parse import parse
from services.mesh.registry.domain import is_service_name
from services.runtime.errors import FieldViolation, InvalidArgumentError, PermissionDeniedError
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.ads.hub import Hub
    from services.mesh.intention_store import IntentionStore, Kept
    from services.mesh.plane import Plane
    from services.mesh.policy.domain import PolicyStore

OPERATOR = "cli"
"""The identity that may change policies and intentions."""


class MeshServicer(mesh_pb2_grpc.MeshServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, hub: Hub, plane: Plane, store: PolicyStore, intentions: IntentionStore) -> None:
        self._hub = hub
        self._plane = plane
        self._store = store
        self._intentions = intentions

    async def ListPolicies(self, request: mesh_pb2.ListPoliciesRequest, context: Any) -> Any:
        found = convert.policies(self._plane.policies, request.service)
        return mesh_pb2.ListPoliciesResponse(policies=found)

    async def ApplyPolicies(self, request: mesh_pb2.ApplyPoliciesRequest, context: Any) -> Any:
        _only_operator("policies")
        _check(request)
        before = await self._store.read()
        remove = frozenset(request.remove)
        texts = {document.service: document.text for document in request.documents}
        if not request.validate_only:
            await self._store.write(texts, remove=remove)
            # Not left to the watch: whoever applied a policy finds it in force.
            self._plane.set_policies(await self._store.read())
        applied = [
            mesh_pb2.AppliedPolicy(service=service, change=_change(before.get(service), text))
            for service, text in sorted(texts.items())
        ]
        applied += [
            mesh_pb2.AppliedPolicy(service=service, change=mesh_pb2.CHANGE_REMOVED)
            for service in sorted(remove & before.keys())
        ]
        return mesh_pb2.ApplyPoliciesResponse(applied=applied)

    async def ListIntentions(self, request: mesh_pb2.ListIntentionsRequest, context: Any) -> Any:
        return mesh_pb2.ListIntentionsResponse(
            intentions=convert.intentions(self._intentions.table()),
            documents=map(convert.intention_document, self._intentions.kept()),
        )

    async def ApplyIntentions(self, request: mesh_pb2.ApplyIntentionsRequest, context: Any) -> Any:
        _only_operator("intentions")
        documents = _intentions(request)
        remove = frozenset(request.remove)
        before = {kept.destination: kept for kept in self._intentions.kept() if kept.text}
        gone = sorted(to for to in remove & before.keys() if before[to].removable)
        if not request.validate_only:
            await self._intentions.write(documents, remove=remove)
        applied = [
            mesh_pb2.AppliedIntentions(destination=to, change=_difference(before.get(to), document.text))
            for to, document in sorted(documents.items())
        ]
        applied += [mesh_pb2.AppliedIntentions(destination=to, change=mesh_pb2.CHANGE_REMOVED) for to in gone]
        return mesh_pb2.ApplyIntentionsResponse(applied=applied)

    async def GetGraph(self, request: mesh_pb2.GetGraphRequest, context: Any) -> Any:
        return convert.graph(self._hub, self._plane, self._intentions.table())

    async def ListClients(self, request: mesh_pb2.ListClientsRequest, context: Any) -> Any:
        return mesh_pb2.ListClientsResponse(clients=convert.clients(self._hub.clients))

    async def ExplainService(self, request: mesh_pb2.ExplainServiceRequest, context: Any) -> Any:
        if not is_service_name(request.service):
            raise InvalidArgumentError("must be a service's name", field="service")
        return convert.explanation(self._hub, self._plane, request.service)

    async def WatchServerPolicy(
        self, request: mesh_pb2.WatchServerPolicyRequest, context: Any
    ) -> AsyncIterator[mesh_pb2.WatchServerPolicyResponse]:
        last = None
        while True:
            changed = self._plane.policies_changed
            budget = self._plane.policies.of(request.service).retry.budget
            if budget != last:
                last = budget
                yield mesh_pb2.WatchServerPolicyResponse(
                    retry_budget_percent=budget.percent, retry_budget_min_per_second=budget.min_per_second
                )
            await changed.wait()

    async def AwaitDeparture(self, request: mesh_pb2.AwaitDepartureRequest, context: Any) -> Any:
        patience_s = departure.PATIENCE_S
        if request.HasField("patience"):
            patience_s = request.patience.ToTimedelta().total_seconds()
        if not 0 <= patience_s <= departure.MAX_PATIENCE_S:
            raise InvalidArgumentError(f"must be 0 to {departure.MAX_PATIENCE_S:g} s", field="patience")
        left = await departure.awaited(
            self._hub, self._plane, request.service, request.instance_id, patience_s
        )
        return mesh_pb2.AwaitDepartureResponse(still_serving=left.still_serving, behind=left.behind)


def _only_operator(what: str) -> None:
    peer = current().peer
    if peer != OPERATOR:
        raise PermissionDeniedError(
            f"{peer} may not change {what}", reason="NOT_OPERATOR", metadata={"source": peer}
        )


def _check(request: mesh_pb2.ApplyPoliciesRequest) -> None:
    violations = []
    seen: set[str] = set()
    for number, document in enumerate(request.documents):
        field = f"documents[{number}]"
        if document.service in seen:
            violations.append(FieldViolation(field, f"{document.origin}: {document.service} is given twice"))
        seen.add(document.service)
        try:
            parse(Document(document.origin or document.service, document.text), service=document.service)
        except PolicyError as error:
            violations += [FieldViolation(field, problem) for problem in error.message.splitlines()]
    violations += [
        FieldViolation("remove", f"{service!r} is no service's name")
        for service in request.remove
        if not is_service_name(service)
    ]
    if violations:
        text = "\n".join(violation.description for violation in violations)
        raise InvalidArgumentError(text, violations=violations, reason="POLICY_INVALID")


def _intentions(request: mesh_pb2.ApplyIntentionsRequest) -> dict[str, Document]:
    """The texts by destination.

    Raises:
        InvalidArgumentError: One is at fault.
    """
    violations = []
    found: dict[str, Document] = {}
    for number, message in enumerate(request.documents):
        field = f"documents[{number}]"
        document = Document(message.origin or field, message.text)
        try:
            destination = intention_files.parse(document).Name
        except InvalidArgumentError as error:
            violations += [FieldViolation(field, problem) for problem in error.message.splitlines()]
            continue
        if destination in found:
            problem = f"{document.origin}:1: {found[destination].origin} speaks for {destination!r} already"
            violations.append(FieldViolation(field, problem))
        found[destination] = document
    violations += [
        FieldViolation("remove", f"{to!r} is no service's name, nor * for any")
        for to in request.remove
        if to != WILDCARD and not is_service_name(to)
    ]
    violations += [
        FieldViolation("remove", f"{to!r} is to be both written and removed")
        for to in request.remove
        if to in found
    ]
    if violations:
        text = "\n".join(violation.description for violation in violations)
        raise InvalidArgumentError(text, violations=violations, reason="INTENTIONS_INVALID")
    return found


def _difference(before: Kept | None, text: str) -> mesh_pb2.Change.ValueType:
    if before is None:
        return mesh_pb2.CHANGE_ADDED
    same = compared(before.text) == compared(text)
    return mesh_pb2.CHANGE_UNCHANGED if same else mesh_pb2.CHANGE_CHANGED


def _change(before: Document | None, text: str) -> mesh_pb2.Change.ValueType:
    if before is None:
        return mesh_pb2.CHANGE_ADDED
    return mesh_pb2.CHANGE_UNCHANGED if before.text == text else mesh_pb2.CHANGE_CHANGED
