"""The control plane: registry and ADS on one mTLS port."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from plexus.mesh.v1 import mesh_pb2_grpc
from plexus.registry.v1 import registry_pb2_grpc
from services.mesh.ads.hub import Hub
from services.mesh.ads.servicer import add_to_server as add_ads
from services.mesh.bootstrap import write_bootstrap
from services.mesh.consul.kv import KeyValues
from services.mesh.consul.seed import seed
from services.mesh.membership import Membership
from services.mesh.plane import Plane
from services.mesh.policy.consul import PREFIX, ConsulPolicyStore
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.registry.domain import Instance
from services.mesh.registry.local import LocalRegistry
from services.mesh.registry.servicer import RegistryServicer
from services.mesh.servicer import MeshServicer
from services.mesh.trust.domain import domain_of
from services.runtime import telemetry
from services.runtime.config import MeshConfig, ServerConfig, Settings, TelemetryConfig, project_file
from services.runtime.credentials import server_credentials
from services.runtime.pipeline import Pipeline
from services.runtime.service import unless

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.mesh.consul.client import ConsulClient
    from services.mesh.policy.domain import PolicyStore
    from services.mesh.registry.domain import Catalogue, Registry
    from services.mesh.trust.domain import Identity

log = structlog.get_logger("services.mesh")

NAME = "control"
SERVICES = (NAME, "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge")
"""Published from the start; any other service from its first registration on."""
DEBOUNCE_S = 0.02
"""Changes in quick succession, as at a start, become one push."""


async def serve(state_dir: Path, port: int, ready: Callable[[], None], stop: asyncio.Event) -> None:
    """Run the control plane until `stop` is set.

    Args:
        state_dir: Folder of all state.
        port: Loopback port; the same over restarts, since clients read it once.
        ready: Called once it answers.
        stop: Set it to stop.
    """
    settings = Settings()
    server_config = settings.section("server", ServerConfig)
    mesh_config = settings.section("mesh", MeshConfig)
    telemetry.configure_logging(NAME, settings.section("telemetry", TelemetryConfig))
    member = Membership(NAME, state_dir, settings)
    # An identity for the command and for any gRPC client that this user runs.
    visitor = member.certificates("cli")
    folder = _folder(state_dir)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(member)
        if not await unless(stop, member.join()) or not await unless(stop, visitor.obtain()):
            return
        write_bootstrap(
            state_dir / "identities" / "cli", member.control_planes(port), "cli", mesh_config.zone
        )
        hub, trust = Hub(), Trust(member.identity)
        plane = Plane(hub, identity=trust.identity)
        health = HealthServicer()
        checked = await member.serve_health(stack, health)
        served = telemetry.serve_metrics(stack, settings.section("telemetry", TelemetryConfig))
        meta = {"pid": str(os.getpid()), "metrics": served, **checked}
        own = Instance(id="control-1", service=NAME, address=server_config.host, port=port, meta=meta)
        registry = await _registry(stack, member, folder)
        policies, rules = _policies(member, mesh_config, folder), member.all_intentions()
        if member.consul is None:
            await rules.first()
            # Before anyone connects: a first service that finds no endpoint of the registry would back off.
            await registry.register(member.as_yet(own), lease_s=mesh_config.lease_s)
            plane.set_policies(await policies.read())
        plane.publish(SERVICES)
        plane.set_instances({NAME: [own]})
        server = _server(member, server_config, mesh_config, port)
        _add(server, registry, hub, MeshServicer(hub, plane, policies, rules.store), health)
        known = asyncio.Event()
        registration = Registration(registry, member.as_yet(own), lease_s=mesh_config.lease_s)
        work = {
            "catalogue": follow_catalogue(registry, plane, known),
            "policies": follow_policies(policies, plane),
            "rules": rules.follow(),
            "registration": registration.run(),
            "visitor": visitor.rotate(trust.follow(plane)),
            **member.loops(),
        }
        if member.consul is not None:
            work["seeding"] = _seed(member, member.consul, _policy_folder(mesh_config))
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(loop, name=name) for name, loop in work.items()]
            # Clients keep what they have until the catalogue is known; an empty mesh would take it away.
            if await unless(stop, known.wait()):
                await server.start()
                # Also if the rules became known since it was registered.
                if registration.instance != own and await unless(stop, member.rules_known.wait()):
                    registration.replace(own)
                if not stop.is_set():
                    await health.set("", health_pb2.HealthCheckResponse.SERVING)
                    _tell_serving(port, ready)
                await stop.wait()
                await health.enter_graceful_shutdown()
                # ADS streams never end by themselves; clients keep what they have and reconnect.
                await server.stop(grace=0.2)
            for loop in loops:
                loop.cancel()
        if member.consul is not None:  # which goes on, and would miss it
            await registration.deregister()
    log.info("stopped")


def _folder(state_dir: Path) -> Path:
    folder = state_dir / "data" / NAME
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _tell_serving(port: int, ready: Callable[[], None]) -> None:
    ready()
    log.info("serving", port=port, pid=os.getpid())


def _server(member: Membership, config: ServerConfig, mesh_config: MeshConfig, port: int) -> grpc.aio.Server:
    limits = config.model_copy(update={"max_concurrent_calls": mesh_config.max_streams})
    # Without the option a second control plane on the port would take every other connection, unnoticed.
    server = grpc.aio.server(
        interceptors=[Pipeline(NAME, limits, member.authorizer)], options=[("grpc.so_reuseport", 0)]
    )
    server.add_secure_port(f"{config.netloc}:{port}", server_credentials(member.identity))
    return server


def _add(
    server: grpc.aio.Server, registry: Registry, hub: Hub, mesh: MeshServicer, health: HealthServicer
) -> None:
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(registry), server)
    add_ads(hub, server)
    mesh_pb2_grpc.add_MeshServiceServicer_to_server(mesh, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)


async def _registry(
    stack: AsyncExitStack, member: Membership, folder: Path
) -> LocalRegistry | ConsulRegistry:
    if member.consul is not None:
        return ConsulRegistry(member.consul)
    return await stack.enter_async_context(LocalRegistry(folder / "catalogue.json"))


def _policies(member: Membership, config: MeshConfig, folder: Path) -> PolicyStore:
    if member.consul is not None:
        return ConsulPolicyStore(KeyValues(member.consul))
    return FolderPolicyStore(_policy_folder(config), folder / "policies")


async def _seed(member: Membership, consul: ConsulClient, folder: Path) -> None:
    shipped = await FolderPolicyStore(folder, folder).read()
    values = {PREFIX + service: document.text.encode() for service, document in shipped.items()}
    await seed(consul, await member.intention_files().good(), values)


def _policy_folder(config: MeshConfig) -> Path:
    return config.policies or project_file("consul/policies")


class Trust:
    """The identities that callers expect: those of the trust domain that this process is in."""

    def __init__(self, identity: Identity) -> None:
        self._domain = domain_of(identity)

    def identity(self, service: str) -> str:
        """SPIFFE id of a service's servers."""
        return f"{self._domain}/svc/{service}"

    def follow(self, plane: Plane) -> Callable[[Identity], None]:
        """Publish everything anew when another authority took over, as after Consul lost its data."""

        def changed(identity: Identity) -> None:
            domain = domain_of(identity)
            if domain != self._domain:
                self._domain = domain
                plane.set_instances({service: plane.instances(service) for service in plane.services()})

        return changed


async def follow_catalogue(catalogue: Catalogue, plane: Plane, known: asyncio.Event | None = None) -> None:
    """Publish each change of the instances; set `known` after the first."""
    async for changes in catalogue.changes():
        plane.set_instances(changes)
        if known is not None:
            known.set()
        await asyncio.sleep(DEBOUNCE_S)


async def follow_policies(store: PolicyStore, plane: Plane) -> None:
    """Publish each change of the policies; one that is not valid changes nothing."""
    async for documents in store.watch():
        plane.set_policies(documents)
