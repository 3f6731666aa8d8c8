"""The edge process: renders kong.yml, runs Envoy, counts requests, follows changes of its files."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import structlog
from cryptography import x509

from services.gateway import kong as kong_file
from services.gateway import limits
from services.gateway.config import GatewayConfig
from services.gateway.credentials import CredentialStore
from services.gateway.envoy.bootstrap import Mesh
from services.gateway.envoy.descriptors import plexus_files, transcoded
from services.gateway.envoy.types import Edge
from services.gateway.kong import KongFileError
from services.gateway.pages import pages
from services.gateway.proxy import EdgeConfigError, Proxy
from services.runtime.config import Settings, project_file
from services.runtime.errors import FailedPreconditionError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

HOST = "127.0.0.1"
_IDENTITY_FILES = ("ca.pem", "cert.pem", "key.pem")
_IDENTITY_TIMEOUT_S = 10.0
_READY_TIMEOUT_S = 20.0
_POLL_S = 0.05
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
        state_dir: The state folder, with the edge's identity under `identities/edge`.
        http_port: Port for clients, on the loopback address.
        control_port: Port of the control plane's ADS, on the loopback address.
        ready: Called once, when requests are taken.
        stop: Ends the edge gracefully.
        config: Settings; default: the `gateway` section of the configuration.

    Raises:
        KongFileError: kong.yml holds something that the edge does not honour.
        EdgeConfigError: Envoy refuses the rendered configuration.
        FailedPreconditionError: There is no identity for the edge.
    """
    config = config or Settings().section("gateway", GatewayConfig)
    async with AsyncExitStack() as stack:
        running = await _Running.open(_absolute(state_dir), http_port, control_port, config, stack)
        await running.start()
        ready()
        log.info("edge_ready", address=f"http://{HOST}:{http_port}", envoy_pid=running.proxy.pid)
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(running.keep_alive()), tasks.create_task(running.follow_files())]
            await stop.wait()
            for loop in loops:
                loop.cancel()


class _Running:
    """The parts of one edge."""

    def __init__(self, state_dir: Path, port: int, config: GatewayConfig, sockets: Path, mesh: Mesh) -> None:
        self._config = config
        self._kong_path = config.kong_file or project_file("gateway/kong.yml")
        self._store = CredentialStore(state_dir)
        self._port = port
        self._limits_socket = sockets / "limits.sock"
        self._descriptors, self._proto_services = transcoded(plexus_files())
        self._seen = self._stamps()
        self.edge = self._render()
        self.limiter = limits.Limiter(self.edge.kong)
        folder = state_dir / "run" / "edge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.proxy = Proxy(folder, sockets, mesh, workers=config.workers)

    @classmethod
    async def open(
        cls, state_dir: Path, port: int, control_port: int, config: GatewayConfig, stack: AsyncExitStack
    ) -> _Running:
        """Build the parts and register their ends with `stack`."""
        sockets = _socket_folder(state_dir, stack)
        mesh = await _mesh(state_dir, control_port)
        running = await asyncio.to_thread(cls, state_dir, port, config, sockets, mesh)
        await running._serve_limits(stack)  # noqa: SLF001 - its own factory
        stack.push_async_callback(running.proxy.stop, config.drain_s)
        return running

    async def _serve_limits(self, stack: AsyncExitStack) -> None:
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
            host=HOST,
            port=self._port,
            limits_socket=self._limits_socket,
            pages=pages(),
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
        """Take over changes of kong.yml and of the credentials; a file at fault changes nothing."""
        while True:
            await asyncio.sleep(self._config.reload_interval_s)
            stamps = self._stamps()
            if stamps == self._seen:
                continue
            self._seen = stamps
            try:
                edge = await asyncio.to_thread(self._render)
                await self.proxy.configure(edge)
            except (KongFileError, EdgeConfigError, PlexusError) as error:
                log.error("edge_change_refused", reason=str(error))  # noqa: TRY400 - the text says all
                continue
            self._seen = self._stamps()
            self.edge = edge
            self.limiter.reconfigure(edge.kong)
            log.info("edge_changed", routes=sum(1 for _ in edge.kong.routes()))

    def _stamps(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._kong_path, self._store.path))


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


async def _mesh(state_dir: Path, control_port: int) -> Mesh:
    identity = state_dir / "identities" / "edge"
    try:
        async with asyncio.timeout(_IDENTITY_TIMEOUT_S):
            while not all((identity / name).is_file() for name in _IDENTITY_FILES):  # noqa: ASYNC110 - files tell nobody
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise FailedPreconditionError(
            "the edge has no identity yet; `plexus up` makes one", reason="NO_IDENTITY"
        ) from error
    certificate = x509.load_pem_x509_certificate((identity / "cert.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if "/svc/" in uri]
    if not uris:
        raise FailedPreconditionError("the edge's certificate names no service", reason="NO_IDENTITY")
    return Mesh(
        control_host=HOST,
        control_port=control_port,
        identity_dir=identity,
        sds_dir=state_dir / "run" / "edge" / "sds",
        spiffe_prefix=uris[0].rpartition("/svc/")[0],
    )
