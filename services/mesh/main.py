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
from services.mesh.intentions import IntentionAuthorizer, load
from services.mesh.plane import Plane
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.registry.client import Registration
from services.mesh.registry.domain import Instance
from services.mesh.registry.local import LocalRegistry
from services.mesh.registry.servicer import RegistryServicer
from services.mesh.servicer import MeshServicer
from services.mesh.trust.local import LocalCertificateSource
from services.runtime import telemetry
from services.runtime.config import MeshConfig, ServerConfig, Settings, TelemetryConfig, project_file
from services.runtime.credentials import server_credentials
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.mesh.policy.domain import PolicyStore
    from services.mesh.registry.domain import Catalogue

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
    telemetry_config = settings.section("telemetry", TelemetryConfig)
    telemetry.configure_logging(NAME, telemetry_config)
    log = structlog.get_logger("services.mesh")

    source = LocalCertificateSource(state_dir, NAME, mesh_config.certificate_ttl_s)
    identity = source.ensure()
    # An identity for the command and for any gRPC client that this user runs.
    visitor = LocalCertificateSource(state_dir, "cli", mesh_config.certificate_ttl_s)
    write_bootstrap(visitor.ensure().cert_path.parent, [f"localhost:{port}"], "cli", mesh_config.zone)

    folder = state_dir / "data" / NAME
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    intentions = mesh_config.intentions or project_file("consul/intentions")
    authorizer = IntentionAuthorizer(intentions, destination=NAME)
    # Without this a second control plane on the port would take every other connection, unnoticed.
    alone = [("grpc.so_reuseport", 0)]
    limits = server_config.model_copy(update={"max_concurrent_calls": mesh_config.max_streams})
    server = grpc.aio.server(interceptors=[Pipeline(NAME, limits, authorizer)], options=alone)
    hub = Hub()
    plane = Plane(hub)
    policies = FolderPolicyStore(mesh_config.policies or project_file("consul/policies"), folder / "policies")

    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(LocalRegistry(folder / "catalogue.json"))
        metrics = telemetry.serve_metrics(stack)
        own = Instance(
            id="control-1",
            service=NAME,
            address="127.0.0.1",
            port=port,
            meta={"pid": str(os.getpid()), "metrics": f"127.0.0.1:{metrics}"},
        )
        # Before anyone connects: a first service that finds no endpoint of the registry would back off.
        await registry.register(own, lease_s=mesh_config.lease_s)
        plane.set_policies(await policies.read())
        plane.publish(SERVICES)
        plane.set_instances({NAME: [own]})
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(registry), server)
        add_ads(hub, server)
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(
            MeshServicer(hub, plane, policies, lambda: load(intentions)), server
        )
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))
        await server.start()
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(follow_catalogue(registry, plane)),
                tasks.create_task(follow_policies(policies, plane)),
                tasks.create_task(Registration(registry, own, lease_s=mesh_config.lease_s).run()),
                tasks.create_task(source.rotate(lambda _identity: None)),
                tasks.create_task(visitor.rotate(lambda _identity: None)),
            ]
            await health.set("", health_pb2.HealthCheckResponse.SERVING)
            ready()
            log.info("serving", port=port, pid=os.getpid())
            await stop.wait()
            await health.enter_graceful_shutdown()
            # ADS streams never end by themselves; clients keep what they have and reconnect.
            await server.stop(grace=0.2)
            for loop in loops:
                loop.cancel()
    log.info("stopped")


async def follow_catalogue(catalogue: Catalogue, plane: Plane) -> None:
    """Publish each change of the instances."""
    async for changes in catalogue.changes():
        plane.set_instances(changes)
        await asyncio.sleep(DEBOUNCE_S)


async def follow_policies(store: PolicyStore, plane: Plane) -> None:
    """Publish each change of the policies; one that is not valid changes nothing."""
    async for documents in store.watch():
        plane.set_policies(documents)
