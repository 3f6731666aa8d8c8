"""An instance stops when nobody calls it any more: what the wait for that waits for."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc.aio
import pytest

from plexus.mesh.v1 import mesh_pb2_grpc
from services.mesh.departure import Departure, awaited, departed
from services.mesh.intention_files import IntentionFiles
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.registry.domain import Health, Instance
from services.mesh.registry.local import LocalRegistry
from services.mesh.servicer import MeshServicer
from services.mesh.trust.local import LocalCertificateSource
from services.mesh.xds.resources import ENDPOINT
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.credentials import server_credentials
from services.runtime.pipeline import Pipeline
from tests.contracts.registry import instance
from tests.mesh.test_ads import Stream, World, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LONG_S = 60.0
ONE, TWO = instance(1), instance(2)


@pytest.fixture
def world() -> World:
    world = World()
    world.instances(1, 2)
    return world


def follower(world: World, node: str = "test") -> Stream:
    """A client that has accepted the endpoints of `vectors`."""
    stream = world.stream()
    asked = request(ENDPOINT, "vectors")
    asked.node.id = node
    (response,) = stream.ask(asked)
    assert stream.ask(request(ENDPOINT, "vectors", nonce=response.nonce)) == []
    return stream


def drain(world: World) -> None:
    draining = replace(ONE, health=Health.DRAINING)
    world.plane.set_instances({"vectors": [draining, TWO]})


def waiting(world: World, patience_s: float = LONG_S) -> asyncio.Task[Departure]:
    return asyncio.create_task(awaited(world.hub, world.plane, "vectors", ONE.id, patience_s))


async def unfinished(task: asyncio.Task[Departure]) -> bool:
    """Whether it still waits after it has looked several times."""
    done, _ = await asyncio.wait([task], timeout=0.1)
    return not done


async def test_it_ends_when_every_follower_has_accepted_and_not_before(world: World) -> None:
    first, second = follower(world, "first"), follower(world, "second")
    left = waiting(world)
    assert await unfinished(left)  # it serves
    drain(world)
    (one,) = first.look()
    (two,) = second.look()
    first.ask(request(ENDPOINT, "vectors", nonce=one.nonce))
    assert await unfinished(left)  # the second has not answered
    second.ask(request(ENDPOINT, "vectors", nonce=two.nonce))
    assert await left == Departure(still_serving=False, behind=[])


async def test_a_newer_state_that_is_not_accepted_yet_is_no_reason_to_wait(world: World) -> None:
    stream = follower(world)
    drain(world)
    left = waiting(world)
    (response,) = stream.look()
    assert await unfinished(left)
    world.instances(2, 3)
    stream.ask(request(ENDPOINT, "vectors", nonce=response.nonce))
    assert await left == Departure(still_serving=False, behind=[])


async def test_a_client_that_goes_away_or_never_followed_is_not_waited_for(world: World) -> None:
    gone = follower(world)
    world.stream().ask(request(ENDPOINT, "storage"))
    drain(world)
    left = waiting(world)
    gone.look()
    assert await unfinished(left)
    gone.close()
    assert await left == Departure(still_serving=False, behind=[])


async def test_patience_ends_the_wait_and_tells_who_is_behind(world: World) -> None:
    silent, refusing = follower(world, "silent"), follower(world, "refusing")
    assert await waiting(world, 0.01) == Departure(still_serving=True, behind=[])
    drain(world)
    silent.look()
    (response,) = refusing.look()
    refusing.ask(request(ENDPOINT, "vectors", nonce=response.nonce, error="no"))
    assert await waiting(world, 0.01) == Departure(still_serving=False, behind=["refusing", "silent"])


class Replica:
    """A control plane's MeshService on mTLS, over a hub of its own."""

    def __init__(self, state: Path, number: int, service: str = "control") -> None:
        self.world = World()
        self.world.instances(1, 2)
        identity = LocalCertificateSource(state, service, 3600).ensure()
        pipeline = Pipeline("control", ServerConfig(), AllowAll())
        self.server = grpc.aio.server(interceptors=[pipeline], options=[("grpc.so_reuseport", 0)])
        store = FolderPolicyStore(state, state)
        servicer = MeshServicer(self.world.hub, self.world.plane, store, IntentionFiles(state))
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(servicer, self.server)
        port = self.server.add_secure_port("127.0.0.1:0", server_credentials(identity))
        self.instance = Instance(id=f"control-{number}", service="control", address="127.0.0.1", port=port)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[LocalRegistry]:
    async with LocalRegistry(tmp_path / "catalogue.json") as registry:
        yield registry


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def replica(
    registry: LocalRegistry, stack: AsyncExitStack, state: Path, number: int, service: str = "control"
) -> Replica:
    made = Replica(state, number, service)
    await made.server.start()
    stack.push_async_callback(made.server.stop, 0)
    await registry.register(made.instance, lease_s=LONG_S)
    return made


async def test_the_clients_of_each_control_plane_are_waited_for(
    tmp_path: Path, registry: LocalRegistry, stack: AsyncExitStack
) -> None:
    replicas = [await replica(registry, stack, tmp_path, number) for number in (1, 2)]
    streams = [follower(each.world) for each in replicas]
    identity = LocalCertificateSource(tmp_path, "vectors", 3600).ensure()
    leaving = asyncio.create_task(departed(registry, ONE, identity, patience_s=LONG_S / 2))
    for each, stream in zip(replicas, streams, strict=True):
        assert not (await asyncio.wait([leaving], timeout=0.1))[0]
        drain(each.world)
        (response,) = stream.look()
        stream.ask(request(ENDPOINT, "vectors", nonce=response.nonce))
    assert await leaving


async def test_a_control_plane_that_is_away_or_another_is_not_an_answer(
    tmp_path: Path, registry: LocalRegistry, stack: AsyncExitStack
) -> None:
    identity = LocalCertificateSource(tmp_path, "vectors", 3600).ensure()
    assert not await departed(registry, ONE, identity)  # nobody to ask
    here = await replica(registry, stack, tmp_path, 1)
    drain(here.world)
    assert await departed(registry, ONE, identity)
    impostor = await replica(registry, stack, tmp_path, 2, "storage")
    drain(impostor.world)
    assert not await departed(registry, ONE, identity)
    await registry.deregister("control-2")
    await here.server.stop(0)
    assert not await departed(registry, ONE, identity)
