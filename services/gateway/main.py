"""The edge process: renders kong.yml, runs Envoy, counts requests, follows changes of its files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc.aio
import structlog

from services.gateway import kong as kong_file
from services.gateway import limits
from services.gateway.config import GatewayConfig
from services.gateway.credentials import CredentialStore
from services.gateway.envoy.bindings import bindings
from services.gateway.envoy.bootstrap import Mesh, mesh_services
from services.gateway.envoy.descriptors import plexus_files, transcoded
from services.gateway.envoy.types import Certificate, Edge
from services.gateway.kong import KongFileError
from services.gateway.pages import pages
from services.gateway.proxy import EdgeConfigError, Proxy
from services.gateway.traffic import follow
from services.mesh.membership import Membership
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import PLAIN_TAG, PORT_META, ConsulRegistry
from services.mesh.registry.domain import Instance
from services.mesh.trust.domain import domain_of
from services.runtime import telemetry
from services.runtime.addresses import netloc
from services.runtime.config import MeshConfig, Settings, TelemetryConfig, project_file
from services.runtime.errors import FailedPreconditionError, PlexusError
from services.runtime.service import VERSION, unless

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.gateway.traffic import Way
    from services.mesh.trust.domain import Identity

log = structlog.get_logger(__name__)

NAME = "edge"
_READY_TIMEOUT_S = 20.0
_MAX_SOCKET_PATH = 90
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 5.0
_STABLE_S = 30.0


async def serve(
    state_dir: Path,
    http_port: int,
    control_port: int,
    ready: Callable[[], None],
    stop: asyncio.Event,
    *,
    config: GatewayConfig | None = None,
) -> None:
    """Run the edge until `stop` is set; call from the main thread.

    Args:
        state_dir: The state folder.
        http_port: Port for clients.
        control_port: Port of the control plane's ADS, on the loopback address.
        ready: Called once, when requests are taken.
        stop: Ends the edge gracefully.
        config: Settings; default: the `gateway` section of the configuration.

    Raises:
        KongFileError: kong.yml holds something that the edge does not honour.
        EdgeConfigError: Envoy refuses the rendered configuration.
    """
    settings = Settings()
    config = config or settings.section("gateway", GatewayConfig)
    state_dir = _absolute(state_dir)
    telemetry.configure_logging(NAME, settings.section("telemetry", TelemetryConfig))
    member = Membership(NAME, state_dir, settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(member)
        if not await unless(stop, member.join()):
            return
        sockets = _socket_folder(state_dir, stack)
        mesh = _mesh(state_dir, member.control_planes(control_port), member.identity)
        running = await asyncio.to_thread(_Running, state_dir, http_port, config, sockets, mesh)
        await running.serve_limits(stack)
        stack.push_async_callback(running.proxy.stop, config.drain_s)
        await running.start()
        ready()
        log.info("edge_ready", address=config.url(http_port), envoy_pid=running.proxy.pid)
        registration = _registration(
            member, config.reachable_at, http_port, settings.section("mesh", MeshConfig)
        )
        async with asyncio.TaskGroup() as tasks:
            loops = [
                *([tasks.create_task(registration.run())] if registration is not None else []),
                tasks.create_task(running.keep_alive()),
                tasks.create_task(running.follow_files()),
                tasks.create_task(running.follow_policies(member.identity)),
                # Envoy watches the identity's files itself.
                *(
                    tasks.create_task(loop, name=name)
                    for name, loop in member.loops(_same_domain(member.identity)).items()
                ),
            ]
            await stop.wait()
            for loop in loops:
                loop.cancel()
        if registration is not None:
            await registration.deregister()


def _registration(member: Membership, host: str, port: int, config: MeshConfig) -> Registration | None:
    """The edge in Consul's catalogue, for those who look there; in the mesh nobody calls it."""
    if member.consul is None:
        return None
    meta = {PORT_META: netloc(host, port), "pid": str(os.getpid())}
    instance = Instance(
        id=f"{NAME}-1",
        service=NAME,
        address=host,
        port=port,
        version=config.version or VERSION,
        zone=config.zone,
        tags=(PLAIN_TAG,),
        meta=meta,
    )
    return Registration(ConsulRegistry(member.consul), instance, lease_s=config.lease_s)


def _same_domain(joined: Identity) -> Callable[[Identity], None]:
    """Envoy is configured with the trust domain of the start; in another one the edge starts anew."""

    def check(identity: Identity) -> None:
        if domain_of(identity) != domain_of(joined):
            raise FailedPreconditionError("another authority took over", reason="TRUST_DOMAIN_CHANGED")

    return check


class _Running:
    """The parts of one edge."""

    def __init__(self, state_dir: Path, port: int, config: GatewayConfig, sockets: Path, mesh: Mesh) -> None:
        self._config = config
        self._kong_path = config.kong_path or project_file("gateway/kong.yml")
        self._store = CredentialStore(state_dir)
        self._port = port
        self._limits_socket = sockets / "limits.sock"
        self._descriptors, self._proto_services = transcoded(plexus_files())
        self._bindings = bindings(plexus_files())
        self._ways: dict[str, tuple[Way, ...]] = {}
        self._controls = mesh.control_planes
        self._changing = asyncio.Lock()
        self._renamed = asyncio.Event()
        self._seen = self._stamps()
        self.edge = self._render()
        self.limiter = limits.Limiter(self.edge.kong)
        folder = state_dir / "run" / "edge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.proxy = Proxy(folder, sockets, mesh, workers=config.workers)

    async def serve_limits(self, stack: AsyncExitStack) -> None:
        """Answer Envoy's questions about rate limits."""
        self._limits_socket.unlink(missing_ok=True)
        server = grpc.aio.server()
        limits.add_to_server(self.limiter, server)
        server.add_insecure_port(f"unix:{self._limits_socket}")
        await server.start()
        stack.push_async_callback(server.stop, 1.0)

    def _render(self) -> Edge:
        kong = kong_file.load(self._kong_path)
        names = [consumer.username for consumer in kong.consumers]
        return Edge(
            kong=kong,
            credentials=self._store.ensure(names),
            descriptors=self._descriptors,
            proto_services=self._proto_services,
            host=self._config.host,
            port=self._port,
            limits_socket=self._limits_socket,
            pages=pages(),
            bindings=self._bindings,
            ways=dict(self._ways),
            certificate=_certificate(self._config),
        )

    async def start(self) -> None:
        """Configure and start Envoy."""
        await self.proxy.configure(self.edge)
        self._seen = self._stamps()
        await self.proxy.start()
        await self.proxy.wait_ready(_READY_TIMEOUT_S)

    async def keep_alive(self) -> None:
        """Start Envoy again whenever it ends, with growing pauses while it keeps ending."""
        clock = asyncio.get_running_loop().time
        backoff_s = _FIRST_BACKOFF_S
        started = clock()
        while True:
            status = await self.proxy.wait()
            if clock() - started > _STABLE_S:
                backoff_s = _FIRST_BACKOFF_S
            log.error("envoy_ended", status=status, restart_in_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)
            started = clock()
            await self.proxy.start()
            with contextlib.suppress(TimeoutError, EdgeConfigError):
                await self.proxy.wait_ready(_READY_TIMEOUT_S)
                log.info("envoy_restarted", pid=self.proxy.pid)

    async def follow_files(self) -> None:
        """Take over changes of kong.yml, credentials and certificate; a file at fault changes nothing."""
        while True:
            await asyncio.sleep(self._config.reload_interval_s)
            stamps = self._stamps()
            if stamps == self._seen:
                continue
            self._seen = stamps
            services = mesh_services(self.edge.kong).keys()
            if await self._change():
                self._seen = self._stamps()
                self.limiter.reconfigure(self.edge.kong)
                log.info("edge_changed", routes=sum(1 for _ in self.edge.kong.routes()))
                if mesh_services(self.edge.kong).keys() != services:
                    self._renamed.set()

    async def follow_policies(self, identity: Identity) -> None:
        """Take over where the traffic policies of the services in kong.yml send calls."""
        while True:
            self._renamed.clear()
            await unless(self._renamed, self._follow_policies(identity))

    async def _follow_policies(self, identity: Identity) -> None:
        services = sorted(mesh_services(self.edge.kong))
        async for told in follow(self._controls, identity, services):
            before = dict(self._ways)
            self._ways.update(told)
            if self._ways != before and await self._change():
                log.info("edge_routes_changed", services=sorted(told))

    async def _change(self) -> bool:
        """Render anew and put it in force; False if that is refused, and all stays as it is."""
        async with self._changing:
            try:
                edge = await asyncio.to_thread(self._render)
                await self.proxy.configure(edge)
            except (KongFileError, EdgeConfigError, PlexusError) as error:
                log.error("edge_change_refused", reason=str(error))  # noqa: TRY400 - the text says all
                return False
            self.edge = edge
            return True

    def _stamps(self) -> tuple[tuple[int, int] | None, ...]:
        public = (self._config.tls_certificate, self._config.tls_key)
        paths = (self._kong_path, self._store.path, *(path for path in public if path is not None))
        return tuple(_stamp(path) for path in paths)


def _certificate(config: GatewayConfig) -> Certificate | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificate(_text("tls_certificate", config.tls_certificate), key=_text("tls_key", config.tls_key))


def _text(setting: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not PEM"
        raise EdgeConfigError(f"gateway.{setting}: {path}: {reason}") from error


def _absolute(path: Path) -> Path:
    return path.absolute()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _socket_folder(state_dir: Path, stack: AsyncExitStack) -> Path:
    """A private folder whose path fits into a socket address (108 bytes)."""
    folder = state_dir / "run" / "edge"
    if len(str(folder)) <= _MAX_SOCKET_PATH:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plexus-edge-")))


def _mesh(state_dir: Path, control_planes: Sequence[str], identity: Identity) -> Mesh:
    addresses = [urlsplit(f"//{each}") for each in control_planes]
    return Mesh(
        control_planes=tuple((each.hostname or "127.0.0.1", each.port or 0) for each in addresses),
        identity_dir=identity.cert_path.parent,
        sds_dir=state_dir / "run" / "edge" / "sds",
        spiffe_prefix=identity.spiffe_id.rpartition("/svc/")[0],
    )
