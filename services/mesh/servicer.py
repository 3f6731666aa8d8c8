"""MeshService: what the control plane knows, and policies taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from services.mesh import convert, departure
from services.mesh.policy.domain import Document, PolicyError
from services.mesh.policy.parse import parse
from services.mesh.registry.domain import is_service_name
from services.runtime.errors import FieldViolation, InvalidArgumentError, PermissionDeniedError
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.mesh.ads.hub import Hub
    from services.mesh.intentions import IntentionTable
    from services.mesh.plane import Plane
    from services.mesh.policy.domain import PolicyStore

OPERATOR = "cli"
"""The identity that may change policies."""


class MeshServicer(mesh_pb2_grpc.MeshServiceServicer):
    """Validates, delegates, converts."""

    def __init__(
        self, hub: Hub, plane: Plane, store: PolicyStore, intentions: Callable[[], IntentionTable]
    ) -> None:
        self._hub = hub
        self._plane = plane
        self._store = store
        self._intentions = intentions

    async def ListPolicies(self, request: mesh_pb2.ListPoliciesRequest, context: Any) -> Any:
        found = convert.policies(self._plane.policies, request.service)
        return mesh_pb2.ListPoliciesResponse(policies=found)

    async def ApplyPolicies(self, request: mesh_pb2.ApplyPoliciesRequest, context: Any) -> Any:
        peer = current().peer
        if peer != OPERATOR:
            raise PermissionDeniedError(
                f"{peer} may not change policies", reason="NOT_OPERATOR", metadata={"source": peer}
            )
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
        return mesh_pb2.ListIntentionsResponse(intentions=convert.intentions(self._intentions()))

    async def GetGraph(self, request: mesh_pb2.GetGraphRequest, context: Any) -> Any:
        return convert.graph(self._hub, self._plane, self._intentions())

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


def _change(before: Document | None, text: str) -> mesh_pb2.Change.ValueType:
    if before is None:
        return mesh_pb2.CHANGE_ADDED
    return mesh_pb2.CHANGE_UNCHANGED if before.text == text else mesh_pb2.CHANGE_CHANGED
