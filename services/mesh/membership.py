"""How a process takes part in the mesh: its identity, the rules it obeys and where it registers.

Without Consul all of it is Plexus's own: the local CA, the shipped intentions, the control plane's registry.
With Consul they are Consul's: the Connect CA, the intentions kept there, the agent on this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2_grpc

from services.mesh.bootstrap import write_bootstrap
from services.mesh.consul.config import ConsulConfig
from services.mesh.consul.intentions import ConsulIntentions, watch_intentions
from services.mesh.direct import CONTROL
from services.mesh.intention_files import IntentionFiles
from services.mesh.intentions import IntentionAuthorizer, IntentionTable
from services.mesh.registry.client import RemoteRegistry
from services.mesh.registry.consul import HEALTH_META, ConsulRegistry
from services.mesh.registry.domain import MAX_LABEL_LENGTH, WAITS_META, Health
from services.mesh.trust.consul import ConnectCertificateSource
from services.mesh.trust.local import LocalCertificateSource
from services.runtime.config import MeshConfig, ServerConfig, Settings, project_file
from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any

    from grpc_health.v1._async import HealthServicer

    from plexus.client.channel import Mesh
    from services.mesh.consul.client import ConsulClient
    from services.mesh.intention_store import IntentionStore
    from services.mesh.registry.domain import Instance, Registry
    from services.mesh.trust.domain import CertificateSource, Identity

log = structlog.get_logger(__name__)

_RETRY_MIN_S, _RETRY_MAX_S = 0.2, 5.0
_CONNECT_S = 2.0


def enter_xds(
    identity: Identity, service: str, servers: Sequence[str], zone: str, *, number: int = 1
) -> None:
    """Give gRPC its xDS bootstrap; before the first xds channel, since gRPC reads the variable once.

    Args:
        identity: Of this process.
        service: Its name.
        servers: Control planes as host:port.
        zone: Where this process runs.
        number: Which of the service's instances; each has a bootstrap file of its own.
    """
    node_id = f"{service}-{os.getpid()}"
    bootstrap = write_bootstrap(
        identity.cert_path.parent, servers, node_id, zone, "" if number == 1 else str(number)
    )
    os.environ["GRPC_XDS_BOOTSTRAP"] = str(bootstrap)


def _consul(config: ConsulConfig) -> ConsulClient | None:
    if not config.enabled:
        return None
    from services.mesh.consul.client import ConsulClient  # noqa: PLC0415 - 15 MiB of every process, for few

    return ConsulClient(config)


async def _found(dependency: str, address: str, there: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a dependency, saying so; a pause between two looks grows and has jitter."""
    failures = 0
    while not await there():
        failures += 1
        if failures == 1:
            log.warning("waiting_for", dependency=dependency, address=address)
        longest = min(_RETRY_MAX_S, _RETRY_MIN_S * 2 ** min(failures, 16))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
    if failures:
        log.info("found", dependency=dependency, after_failures=failures)


class AllIntentions:
    """The rules of every service, followed where they are kept, to be shown and changed.

    Attributes:
        store: Where that is.
    """

    def __init__(self, store: IntentionStore) -> None:
        self.store = store
        self._watch = store.watch()

    async def first(self) -> None:
        """Wait until they are known."""
        await anext(self._watch)

    async def follow(self) -> None:
        """Follow them, for ever."""
        async for _ in self._watch:
            pass


class Membership:
    """One process's part in the mesh; open it with `async with`, then `join`.

    Attributes:
        consul: The open client, if Consul is configured.
        authorizer: Answers by the present intentions; denies everything before `join`.
        rules_known: Set once the intentions of this service are known; until then it denies everything.
    """

    def __init__(self, service: str, state_dir: Path, settings: Settings) -> None:
        """Read the configuration.

        Args:
            service: Name of this process in the mesh.
            state_dir: Folder of all state.
            settings: With the sections `mesh`, `server` and `consul`.

        Raises:
            InvalidArgumentError: A section is not valid.
        """
        self._service = service
        self._state_dir = state_dir
        self._mesh_config = settings.section("mesh", MeshConfig)
        self._server_config = settings.section("server", ServerConfig)
        self.consul = _consul(settings.section("consul", ConsulConfig))
        self.source = self.certificates(service)
        self.authorizer = IntentionAuthorizer(IntentionTable(), destination=service)
        self._identity: Identity | None = None
        self._rules: AsyncIterator[IntentionTable] | None = None
        self._unjudged: list[str] = []
        self.rules_known = asyncio.Event()
        self._fault = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self.consul is not None:
            await self._stack.enter_async_context(self.consul)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def identity(self) -> Identity:
        """What `join` got."""
        if self._identity is None:
            raise RuntimeError("not joined")
        return self._identity

    def enter_xds(self, control_port: int, *, number: int = 1) -> None:
        """Give gRPC its xDS bootstrap; before the first xds channel.

        Args:
            control_port: Loopback port of the control plane, if the configuration names none.
            number: Which of the service's instances this is.
        """
        servers = self.control_planes(control_port)
        enter_xds(self.identity, self._service, servers, self._mesh_config.zone, number=number)

    def control_planes(self, control_port: int) -> Sequence[str]:
        """Where the control planes are, as host:port; if the configuration names none, on this host."""
        return self._mesh_config.control_planes or [f"{self._server_config.reachable_as}:{control_port}"]

    def certificates(self, service: str) -> CertificateSource:
        """Identities of a service, from the authority that counts here."""
        if self.consul is not None:
            return ConnectCertificateSource(self._state_dir, service, self.consul, self._server_config.host)
        return LocalCertificateSource(
            self._state_dir, service, self._mesh_config.certificate_ttl_s, self._server_config.host
        )

    def intention_files(self) -> IntentionFiles:
        """The folder of intentions, and what `plexus mesh apply` wrote over it."""
        folder = self._mesh_config.intentions or project_file("consul/intentions")
        return IntentionFiles(folder, self._state_dir / "data" / CONTROL / "intentions")

    def all_intentions(self) -> AllIntentions:
        """The rules of every service, to be shown and changed."""
        return AllIntentions(self.intention_files() if self.consul is None else ConsulIntentions(self.consul))

    async def join(self) -> Identity:
        """Get the identity and the rules; waits for a Consul that is away, and says so.

        Raises:
            FailedPreconditionError: Consul wants a token and none is configured.
            PermissionDeniedError: Consul does not know the token.
        """
        if self.consul is not None:
            await self._wait_for_consul(self.consul)
        self._identity = await self.source.obtain()
        if self.consul is not None:
            self._rules = watch_intentions(self.consul, self._service)
        else:
            self._rules = self.intention_files().watch()
        self.obey(await anext(self._rules))
        return self._identity

    async def _wait_for_consul(self, consul: ConsulClient) -> None:
        async def there() -> bool:
            try:
                await consul.check_access()
            except UnavailableError:
                return False
            return True

        await _found("consul", consul.config.address, there)

    async def arrive(self, control_port: int) -> Identity:
        """Join, and wait for a control plane to take connections; says what it waits for.

        gRPC's own wait grows to minutes, and who starts in a long outage would serve that much after it.
        """
        identity = await self.join()
        await self._wait_for_control(control_port)
        return identity

    async def _wait_for_control(self, control_port: int) -> None:
        servers = self.control_planes(control_port)

        async def there() -> bool:
            for server in servers:
                address = urlsplit(f"//{server}")
                try:
                    async with asyncio.timeout(_CONNECT_S):
                        _, writer = await asyncio.open_connection(address.hostname, address.port)
                except (OSError, TimeoutError):
                    continue
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                return True
            return False

        await _found("control", ", ".join(servers), there)

    def loops(
        self, on_identity: Callable[[Identity], None] = lambda _identity: None
    ) -> dict[str, Coroutine[Any, Any, None]]:
        """What must run as long as the process does, by name.

        Args:
            on_identity: Told of each new identity.
        """
        found = {"certificate-rotation": self.source.rotate(on_identity)}
        if self._rules is not None:
            found["intentions"] = self._follow(self._rules)
        return found

    async def _follow(self, rules: AsyncIterator[IntentionTable]) -> None:
        async for table in rules:
            self.obey(table)
            log.info("intentions_changed", rules=sum(map(len, table.by_destination.values())))

    def obey(self, table: IntentionTable) -> None:
        """Answer by these rules from now on; those that cannot be judged are told once."""
        self.authorizer.replace(table)
        self._judge(table.fault(self._service))
        unjudged = table.unjudged()
        if unjudged != self._unjudged:
            self._unjudged = unjudged
            if unjudged:
                log.error("intentions_not_judged", rules=unjudged, effect="they deny, and allow nothing")

    def as_yet(self, instance: Instance) -> Instance:
        """An instance as it is to be registered now: one whose rules are not known does not serve."""
        if self.rules_known.is_set():
            return instance
        reason = f"intentions: {'; '.join(self._fault.splitlines())}"
        return replace(
            instance,
            health=Health.NOT_SERVING,
            meta={**instance.meta, WAITS_META: reason[:MAX_LABEL_LENGTH]},
        )

    def _judge(self, fault: str) -> None:
        if fault != self._fault:
            self._fault = fault
            if fault:
                log.error("waiting_for", dependency="intentions", reason=fault, effect="everything is denied")
            else:
                log.info("found", dependency="intentions")
        if not fault:
            self.rules_known.set()

    def registry(self, mesh: Mesh) -> Registry:
        """Where this process registers."""
        return RemoteRegistry(mesh.channel("control")) if self.consul is None else ConsulRegistry(self.consul)

    async def serve_health(self, stack: AsyncExitStack, health: HealthServicer) -> dict[str, str]:
        """Let the agent ask for the health, if there is one; it cannot show a certificate, so without TLS.

        Returns:
            What to add to the instance's meta.
        """
        if self.consul is None:
            return {}
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0)
        return {HEALTH_META: f"127.0.0.1:{port}"}
