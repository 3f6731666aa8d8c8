"""A service process: identity, server, registration and the order in which they start and stop.

Start: certificate, dependencies (the service's own `compose`), server, registration, known intentions, then
SERVING.
Stop: NOT_SERVING, DRAINING in the registry, callers have let go of it and none calls any more, bounded drain,
deregistration, background loops, what `compose` opened, in reverse.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from plexus.client.channel import Mesh
from services.mesh.membership import Membership, enter_xds
from services.mesh.policy.client import follow_retry_budget
from services.mesh.registry.client import Registration
from services.mesh.registry.domain import Instance
from services.mesh.trust.local import LocalCertificateSource
from services.runtime import telemetry
from services.runtime.config import MeshConfig, Section, ServerConfig, Settings, TelemetryConfig
from services.runtime.credentials import server_credentials
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from services.mesh.trust.domain import Identity

SectionT = TypeVar("SectionT", bound=Section)

VERSION = version("plexus-mesh")
QUIET_S = 0.1
"""Without a new call for this long a server has none on the way to it. A call that arrives between the GOAWAY
of a stop and the client's hearing of it is cancelled, and its caller cannot know whether it was begun."""
LEAVE_S = 1.0
"""How long that quiet is waited for: a caller that follows no control plane never lets go."""


class ServiceRuntime:
    """What a service gets to build itself from, and the owner of its background loops."""

    def __init__(
        self, *, name: str, state_dir: Path, settings: Settings, server: grpc.aio.Server, mesh: Mesh
    ) -> None:
        self.name = name
        self.state_dir = state_dir
        self.data_dir = state_dir / "data" / name
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.server = server
        self.mesh = mesh
        self.log = structlog.get_logger(f"services.{name}")
        self._settings = settings
        self.server_config = settings.section("server", ServerConfig)
        self.stopping = asyncio.Event()
        """Set when the service begins to stop: streams that would go on for ever end then."""
        self._loops: set[asyncio.Task[Any]] = set()
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def config(self, model: type[SectionT]) -> SectionT:
        """The service's own configuration section, validated."""
        return self._settings.section(self.name, model)

    def spawn(self, work: Coroutine[Any, Any, object], *, name: str) -> asyncio.Task[Any]:
        """Run a background loop until the service stops; if it crashes, so does the process.

        A loop that ends in silence is how a service stays SERVING and does nothing; the supervisor's restart
        is the better answer.
        """
        task = asyncio.create_task(work, name=name)
        self._loops.add(task)
        task.add_done_callback(self._loop_ended)
        return task

    def _loop_ended(self, task: asyncio.Task[Any]) -> None:
        self._loops.discard(task)
        if task.cancelled() or self.crashed.done():
            return
        error = task.exception()
        if error is not None:
            self.log.error("background_loop_crashed", loop=task.get_name(), exc_info=error)
            self.crashed.set_exception(error)

    async def end_streams(self, pipeline: Pipeline) -> None:
        """Say that it is time, and wait for callers to have heard."""
        self.stopping.set()
        await pipeline.quiet(QUIET_S, within_s=LEAVE_S)

    async def cancel_loops(self) -> None:
        """Cancel the background loops and wait for their ends."""
        loops = list(self._loops)
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Service:
    """A service's name, its composition root and the proto services whose health it reports.

    Attributes:
        name: Mesh name, as in `xds:///<name>`.
        compose: Opens engines on the stack and adds servicers to `runtime.server`.
        proto_services: Full names, such as `plexus.vectors.v1.VectorsService`.
        stateless: It keeps nothing of its own, so several instances may run on one machine.
        groups: Of end users who may call a method, by path, where its proto is another's and does not say.
    """

    name: str
    compose: Callable[[ServiceRuntime, AsyncExitStack], Awaitable[None]]
    proto_services: tuple[str, ...]
    stateless: bool = False
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)


_REFUSABLE = 4
"""Up to this many times the bound a message is refused with a reason; beyond, by gRPC and without one."""
_METADATA_BYTES = 64 * 1024
"""Of a call: more than the edge lets in with a request (32 KiB), so that nothing it let in is refused here.
gRPC's own bound is 16 KiB, and from 8 KiB on it refuses some calls by chance."""


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Channel arguments for the configured bounds of messages and pings, and for that of metadata."""
    return [
        ("grpc.http2.min_ping_interval_without_data_ms", round(config.min_ping_interval_s * 1000)),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ("grpc.max_receive_message_length", _REFUSABLE * config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
    ]


async def serve(
    service: Service,
    *,
    state_dir: Path,
    control_port: int,
    ready: Callable[[], None],
    stop: asyncio.Event,
    number: int = 1,
) -> None:
    """Run a service until `stop` is set.

    Args:
        service: What to run.
        number: Which of its instances on this machine this is, from 1.
        state_dir: Folder of all state.
        control_port: Loopback port of the control plane (registry and ADS).
        ready: Called once the service is registered and SERVING.
        stop: Set it to stop in order.
    """
    settings = Settings()
    server_config = settings.section("server", ServerConfig)
    mesh_config = settings.section("mesh", MeshConfig)
    telemetry_config = settings.section("telemetry", TelemetryConfig)
    telemetry.configure_logging(service.name, telemetry_config)
    tracer, stop_tracing = telemetry.configure_tracing(service.name, telemetry_config)
    member = Membership(service.name, state_dir, settings)

    async with AsyncExitStack() as stack:
        stack.callback(stop_tracing)
        await stack.enter_async_context(member)
        if not await unless(stop, member.arrive(control_port)):
            return
        member.enter_xds(control_port, number=number)
        mesh = await stack.enter_async_context(Mesh())
        pipeline = Pipeline(
            service.name, server_config, member.authorizer, tracer=tracer, groups=service.groups
        )
        server = grpc.aio.server(interceptors=[pipeline], options=server_options(server_config))
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        runtime = ServiceRuntime(
            name=service.name, state_dir=state_dir, settings=settings, server=server, mesh=mesh
        )
        stack.push_async_callback(runtime.cancel_loops)
        for name, loop in member.loops().items():
            runtime.spawn(loop, name=name)
        runtime.spawn(
            follow_retry_budget(mesh.channel("control"), service.name, pipeline.retries.configure),
            name="retry-budget",
        )
        metrics = telemetry.serve_metrics(stack, telemetry_config)

        await service.compose(runtime, stack)
        if server_config.reflection:
            from grpc_reflection.v1alpha import reflection  # noqa: PLC0415 - development only

            reflection.enable_server_reflection((*service.proto_services, reflection.SERVICE_NAME), server)
        port = server.add_secure_port(f"{server_config.netloc}:0", server_credentials(member.identity))
        await server.start()
        checked = await member.serve_health(stack, health)
        instance = Instance(
            id=f"{service.name}-{number}",
            service=service.name,
            address=server_config.host,
            port=port,
            version=mesh_config.version or VERSION,
            zone=mesh_config.zone,
            meta={"pid": str(os.getpid()), "metrics": metrics, **checked},
        )
        registration = Registration(
            member.registry(mesh), member.as_yet(instance), lease_s=mesh_config.lease_s
        )
        renewal = runtime.spawn(registration.run(), name="registration")
        try:
            await _admitted(member, registration, instance, stop, runtime.crashed)
            if not stop.is_set():
                for name in ("", *service.proto_services):
                    await health.set(name, health_pb2.HealthCheckResponse.SERVING)
                ready()
                runtime.log.info("serving", port=port, pid=os.getpid())
            await _first(stop.wait(), runtime.crashed)
        finally:
            started = time.monotonic()
            await health.enter_graceful_shutdown()
            await registration.leave(member.identity)
            await runtime.end_streams(pipeline)
            await server.stop(server_config.drain_s)
            renewal.cancel()
            await registration.deregister()
            runtime.log.info("stopped", seconds=round(time.monotonic() - started, 2))


def join_mesh(
    service: str,
    state_dir: Path,
    control_port: int,
    ttl_s: float,
) -> tuple[LocalCertificateSource, Identity]:
    """Get a process an identity of the local CA, and gRPC its xDS bootstrap, before the first channel.

    Args:
        service: Its name.
        state_dir: Folder of all state.
        control_port: Loopback port of the control plane.
        ttl_s: Life of a certificate.
    """
    source = LocalCertificateSource(state_dir, service, ttl_s)
    identity = source.ensure()
    enter_xds(identity, service, [f"localhost:{control_port}"], "local")
    return source, identity


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Do the work, unless it is time to stop first; tell whether it was done."""
    task = asyncio.ensure_future(work)
    try:
        await _first(task, stop.wait())
        return task.done()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _admitted(
    member: Membership,
    registration: Registration,
    instance: Instance,
    stop: asyncio.Event,
    crashed: asyncio.Future[None],
) -> None:
    """Wait until the instance is registered as one that serves, or it is time to stop."""
    await _first(registration.registered.wait(), stop.wait(), crashed)
    if registration.instance != instance:  # also if the rules became known since
        await _first(member.rules_known.wait(), stop.wait(), crashed)
        if not stop.is_set():
            registration.replace(instance)
            await _first(registration.registered.wait(), stop.wait(), crashed)


async def _first(*waits: Any) -> None:
    """Wait for the first of several, raising its error; those created here are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait and not task.done():
                task.cancel()
