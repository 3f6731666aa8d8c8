"""MeshService over a real server: policies applied, clients and services explained."""

from __future__ import annotations

import asyncio
import re
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import status_pb2

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from plexus.xds.v1 import xds_pb2
from services.mesh.ads.hub import Hub
from services.mesh.intention_files import IntentionFiles
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
        self.rules = folder / "intentions"
        shutil.copytree(project_file("consul/intentions"), self.rules)
        self.intentions = IntentionFiles(self.rules, folder / "written-intentions")
        self.servicer = MeshServicer(self.hub, self.plane, self.store, self.intentions)

    async def look(self) -> None:
        """Let the control plane see the files as they are."""
        await anext(self.intentions.watch())


@pytest.fixture
async def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    await made.look()
    return made


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


def rules(text: str, name: str = "storage") -> mesh_pb2.ApplyIntentionsRequest.Document:
    whole = f"Kind: service-intentions\nName: '{name}'\nSources:\n{text}"
    return mesh_pb2.ApplyIntentionsRequest.Document(origin=f"here/{name}.yaml", text=whole)


async def kept(stub: Any, destination: str) -> Any:
    listed = await stub.ListIntentions(mesh_pb2.ListIntentionsRequest(), timeout=DEADLINE_S)
    return next((each for each in listed.documents if each.destination == destination), None)


ALLOW_SHOP = "- {Name: shop, Action: allow}"


async def test_applied_intentions_are_in_force_and_removed_ones_are_those_of_the_folder_again(
    world: World, connect: Any
) -> None:
    async def applied(**request: Any) -> dict[str, str]:
        message = mesh_pb2.ApplyIntentionsRequest(**request)
        answer = await stub.ApplyIntentions(message, timeout=DEADLINE_S)
        return {each.destination: mesh_pb2.Change.Name(each.change) for each in answer.applied}

    def allowed(destination: str) -> bool:
        return world.intentions.table().decide("shop", destination, "/a.B/C").allowed

    async with connect() as stub:
        both = [rules(ALLOW_SHOP), rules(ALLOW_SHOP, "orders"), rules(ALLOW_SHOP, "*")]
        assert await applied(documents=both, validate_only=True) == {
            "storage": "CHANGE_CHANGED",
            "orders": "CHANGE_ADDED",
            "*": "CHANGE_ADDED",
        }
        assert not allowed("storage")
        assert (await applied(documents=both))["storage"] == "CHANGE_CHANGED"
        assert all(map(allowed, ["storage", "orders", "vectors"]))
        assert (await kept(stub, "storage")).text == both[0].text
        other_words = rules(f"# the shop\n{ALLOW_SHOP}")
        assert await applied(documents=[other_words]) == {"storage": "CHANGE_UNCHANGED"}
        # What the user's own folder holds is not removed from here.
        gone = await applied(remove=["*", "orders", "storage", "vectors"])
        assert gone == dict.fromkeys(("*", "orders", "storage"), "CHANGE_REMOVED")
        assert not any(map(allowed, ["storage", "orders", "vectors"]))
        assert (await kept(stub, "storage")).origin == str(world.rules / "storage.yaml")
        assert await kept(stub, "orders") is None


REFUSED_INTENTIONS = {
    "no such action": (
        [rules("- {Name: shop, Action: maybe}")],
        r"here/storage\.yaml:4: Sources\[0\]\.Action: ",
    ),
    "no service": ([rules(ALLOW_SHOP, "../up")], r"here/\.\./up\.yaml:2: Name: must be a service's name"),
    "twice": ([rules(ALLOW_SHOP), rules("  []")], r"here/storage\.yaml:1: here/storage\.yaml speaks for"),
    "no YAML": ([rules("- {Name: shop")], r"here/storage\.yaml:[45]: "),
}


@pytest.mark.parametrize(("texts", "reason"), REFUSED_INTENTIONS.values(), ids=REFUSED_INTENTIONS.keys())
async def test_intentions_at_fault_refuse_all_with_file_line_and_reason(
    world: World, connect: Any, texts: list[Any], reason: str
) -> None:
    before = world.intentions.kept()
    documents = [rules(ALLOW_SHOP, "orders"), *texts]
    async with connect() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ApplyIntentions(
                mesh_pb2.ApplyIntentionsRequest(documents=documents), timeout=DEADLINE_S
            )
    error = from_rpc_error(refused.value, dependency="control")
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "INTENTIONS_INVALID"
    (violation,) = error.violations
    assert re.match(reason, violation.description), violation
    await world.look()
    assert world.intentions.kept() == before


@pytest.mark.parametrize("remove", ["../up", "", "Orders"])
async def test_what_is_no_destination_is_not_removed(connect: Any, remove: str) -> None:
    async with connect() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ApplyIntentions(mesh_pb2.ApplyIntentionsRequest(remove=[remove]), timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_the_command_may_apply_intentions(connect: Any) -> None:
    async with connect("vectors") as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ApplyIntentions(
                mesh_pb2.ApplyIntentionsRequest(documents=[rules(ALLOW_SHOP)]), timeout=DEADLINE_S
            )
    assert isinstance(from_rpc_error(refused.value, dependency="control"), PermissionDeniedError)


async def test_a_refused_text_is_listed_beside_the_one_in_force(world: World, connect: Any) -> None:
    file = world.rules / "storage.yaml"
    good = file.read_text()
    file.write_text("Kind: service-intentions\nName: storage\n")
    await world.look()
    async with connect() as stub:
        document = await kept(stub, "storage")
    assert document.text == good
    assert document.refusal == f"{file}:1: Sources: Field required"


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
