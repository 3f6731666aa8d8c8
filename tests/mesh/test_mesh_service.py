"""MeshService over a real server: policies applied, clients and services explained."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml
from google.rpc import status_pb2

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from plexus.xds.v1 import xds_pb2
from services.mesh.ads.hub import Hub
from services.mesh.intentions import IntentionTable, ServiceIntentions
from services.mesh.plane import Plane
from services.mesh.policy.client import follow_retry_budget
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.servicer import MeshServicer
from services.mesh.xds.resources import CLUSTER, ENDPOINT
from services.runtime.config import project_file
from services.runtime.errors import InvalidArgumentError, PermissionDeniedError
from services.runtime.status import from_rpc_error
from tests.contracts.registry import instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.conftest import Serve

DEADLINE_S = 60


class World:
    def __init__(self, folder: Path) -> None:
        self.hub = Hub()
        self.plane = Plane(self.hub)
        self.plane.publish(["vectors", "storage"])
        self.plane.set_instances({"vectors": [instance()]})
        self.store = FolderPolicyStore(folder / "base", folder / "written")
        files = sorted(project_file("consul/intentions").glob("*.yaml"))
        rules = [ServiceIntentions.model_validate(yaml.safe_load(file.read_text())) for file in files]
        self.servicer = MeshServicer(self.hub, self.plane, self.store, lambda: IntentionTable.of(rules))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def connect(world: World, serve: Serve) -> Callable[..., AbstractAsyncContextManager[Any]]:
    @asynccontextmanager
    async def opened(peer: str = "cli") -> AsyncIterator[Any]:
        def add(server: grpc.aio.Server) -> None:
            mesh_pb2_grpc.add_MeshServiceServicer_to_server(world.servicer, server)

        async with serve(add, peer=peer) as channel:
            yield mesh_pb2_grpc.MeshServiceStub(channel)

    return opened


def document(text: str, service: str = "vectors") -> mesh_pb2.ApplyPoliciesRequest:
    entry = mesh_pb2.ApplyPoliciesRequest.Document(
        service=service, origin=f"here/{service}.yaml", text=f"service: {service}\n{text}"
    )
    return mesh_pb2.ApplyPoliciesRequest(documents=[entry])


async def test_an_applied_policy_is_in_force_when_the_call_returns(world: World, connect: Any) -> None:
    async with connect() as stub:
        (applied,) = (await stub.ApplyPolicies(document("timeout: 3s"), timeout=DEADLINE_S)).applied
        assert applied == mesh_pb2.AppliedPolicy(service="vectors", change=mesh_pb2.CHANGE_ADDED)
        timeout = world.plane.policies.of("vectors").timeout
        assert timeout is not None
        assert timeout.total_seconds() == 3
        (again,) = (await stub.ApplyPolicies(document("timeout: 3s"), timeout=DEADLINE_S)).applied
        assert again.change == mesh_pb2.CHANGE_UNCHANGED
        (policy,) = (await stub.ListPolicies(mesh_pb2.ListPoliciesRequest(), timeout=DEADLINE_S)).policies
        assert policy.text == "service: vectors\ntimeout: 3s"
        removal = mesh_pb2.ApplyPoliciesRequest(remove=["vectors", "storage"])
        (removed,) = (await stub.ApplyPolicies(removal, timeout=DEADLINE_S)).applied
        assert removed.change == mesh_pb2.CHANGE_REMOVED
        assert world.plane.policies.services() == []


async def test_one_bad_policy_refuses_all_with_file_line_and_reason(world: World, connect: Any) -> None:
    request = document("timeout: 3s")
    request.documents.append(document("timeout: 3 s", "storage").documents[0])
    async with connect() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ApplyPolicies(request, timeout=DEADLINE_S)
    error = from_rpc_error(refused.value, dependency="control")
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "POLICY_INVALID"
    (violation,) = error.violations
    assert violation.field == "documents[1]"
    assert violation.description.startswith("here/storage.yaml:2: timeout: needs a length of time")
    assert await world.store.read() == {}


async def test_a_dry_run_writes_nothing(world: World, connect: Any) -> None:
    request = document("timeout: 3s")
    request.validate_only = True
    async with connect() as stub:
        (applied,) = (await stub.ApplyPolicies(request, timeout=DEADLINE_S)).applied
    assert applied.change == mesh_pb2.CHANGE_ADDED
    assert await world.store.read() == {}


async def test_only_the_command_may_apply(connect: Any) -> None:
    async with connect("vectors") as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ApplyPolicies(document("timeout: 3s"), timeout=DEADLINE_S)
    assert isinstance(from_rpc_error(refused.value, dependency="control"), PermissionDeniedError)


async def test_explain_tells_what_each_client_was_sent_accepted_and_refused(
    world: World, connect: Any
) -> None:
    client = world.hub.connect("search")
    node = xds_pb2.Node(id="search-7", user_agent_name="gRPC Go")

    def say(kind: str, **more: Any) -> list[xds_pb2.DiscoveryResponse]:
        client.take(xds_pb2.DiscoveryRequest(node=node, type_url=kind, resource_names=["vectors"], **more))
        return [xds_pb2.DiscoveryResponse.FromString(each.data) for each in client.responses()]

    (clusters,) = say(CLUSTER)
    say(CLUSTER, response_nonce=clusters.nonce)
    (endpoints,) = say(ENDPOINT)
    say(ENDPOINT, response_nonce=endpoints.nonce, error_detail=status_pb2.Status(message="[bad] thing"))
    async with connect() as stub:
        told = await stub.ExplainService(
            mesh_pb2.ExplainServiceRequest(service="vectors"), timeout=DEADLINE_S
        )
        listed = await stub.ListClients(mesh_pb2.ListClientsRequest(), timeout=DEADLINE_S)
        nobody = await stub.ExplainService(
            mesh_pb2.ExplainServiceRequest(service="storage"), timeout=DEADLINE_S
        )
    assert [entry.address for entry in told.instances] == ["127.0.0.1:4001"]
    (follower,) = told.followers
    assert (follower.node, follower.peer, follower.library) == ("search-7", "search", "gRPC Go")
    accepted, refused = follower.resources
    assert (accepted.kind, accepted.current_accepted, accepted.refusal) == ("Cluster", True, "")
    assert (refused.kind, refused.accepted, refused.refusal) == ("ClusterLoadAssignment", "", "[bad] thing")
    assert refused.sent == refused.current != ""
    (short,) = listed.clients
    assert (list(short.services), short.behind, list(short.refusals)) == (["vectors"], 1, ["[bad] thing"])
    assert not nobody.followers


async def test_the_graph_shows_who_follows_whom_and_whether_they_may(world: World, connect: Any) -> None:
    for peer in ("search", "knowledge"):
        client = world.hub.connect(peer)
        client.take(xds_pb2.DiscoveryRequest(type_url=CLUSTER, resource_names=["vectors"]))
    async with connect() as stub:
        graph = await stub.GetGraph(mesh_pb2.GetGraphRequest(), timeout=DEADLINE_S)
    nodes = {node.service: (node.serving, node.instances) for node in graph.nodes}
    assert nodes == {"vectors": (1, 1), "storage": (0, 0)}
    edges = [(edge.source, edge.destination, edge.clients, edge.intention) for edge in graph.edges]
    assert edges == [("knowledge", "vectors", 1, "allow"), ("search", "vectors", 1, "deny")]


async def test_intentions_are_listed_with_their_permissions(connect: Any) -> None:
    async with connect() as stub:
        listed = (await stub.ListIntentions(mesh_pb2.ListIntentionsRequest(), timeout=DEADLINE_S)).intentions
    rules = {(entry.source, entry.destination): entry for entry in listed}
    assert rules["knowledge", "vectors"].action == "allow"
    assert list(rules["control", "vectors"].permissions) == ["allow /grpc.health.v1.Health/*"]


async def test_servers_follow_their_retry_budget(world: World, serve: Serve) -> None:
    budgets: asyncio.Queue[tuple[float, float]] = asyncio.Queue()

    def add(server: grpc.aio.Server) -> None:
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(world.servicer, server)

    async with serve(add, peer="vectors") as channel, asyncio.timeout(DEADLINE_S):
        following = asyncio.create_task(
            follow_retry_budget(channel, "vectors", lambda *budget: budgets.put_nowait(budget))
        )
        try:
            assert await budgets.get() == (10, 1)
            await world.store.write({"vectors": "service: vectors\nretry: {budget: {percent: 5}}"})
            world.plane.set_policies(await world.store.read())
            assert await budgets.get() == (5, 1)
        finally:
            following.cancel()
