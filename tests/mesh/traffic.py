"""A control plane and servers inside the test, and a real gRPC client in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from services.mesh.ads.hub import Hub
from services.mesh.ads.servicer import add_to_server
from services.mesh.bootstrap import write_bootstrap
from services.mesh.plane import Plane
from services.mesh.policy.domain import Document
from services.mesh.registry.domain import Instance
from services.mesh.trust.local import LocalCertificateSource
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.credentials import server_credentials
from services.runtime.errors import InvalidArgumentError, UnavailableError
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable, Sequence

CALLER = Path(__file__).with_name("caller.py")
ANSWER_S = 90.0
NO_REUSE = [("grpc.so_reuseport", 0)]


class Server:
    """One instance; set `unavailable`, `invalid` or `delay_s` to change how it answers."""

    def __init__(self, name: str, service: str = "vectors", **labels: Any) -> None:
        self.name = name
        self.service = service
        self.labels = labels
        self.calls = 0
        self.active = 0
        self.most = 0
        self.attempts: list[str] = []
        self.unavailable = False
        self.delay_s = 0.0
        self.port = 0
        self.pipeline = Pipeline(service, ServerConfig(), AllowAll())
        self._server: grpc.aio.Server | None = None

    async def start(self, state: Path) -> None:
        identity = LocalCertificateSource(state, self.service, 3600).ensure()
        self._server = grpc.aio.server(interceptors=[self.pipeline], options=NO_REUSE)
        self._server.add_generic_rpc_handlers((self.handlers(),))
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", server_credentials(identity))
        await self._server.start()

    def handlers(self) -> grpc.GenericRpcHandler:
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._ask) for name in ("Ask", "Other")
        }
        return grpc.method_handlers_generic_handler("test.Who", handlers)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def _ask(self, _request: bytes, context: Any) -> bytes:
        self.calls += 1
        headers = dict(context.invocation_metadata())
        self.attempts.append(headers.get("grpc-previous-rpc-attempts", "0"))
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.unavailable:
                raise UnavailableError("as asked")
            if "x-invalid" in headers:
                raise InvalidArgumentError("as asked")
        finally:
            self.active -= 1
        return self.name.encode()

    def instance(self) -> Instance:
        return Instance(
            id=self.name, service=self.service, address="127.0.0.1", port=self.port, **self.labels
        )


class Answers:
    """What a row of calls got."""

    def __init__(self, seen: dict[str, int], seconds: float) -> None:
        self.seen = seen
        self.seconds = seconds
        self.total = sum(seen.values())

    def share(self, name: str) -> float:
        return self.seen.get(name, 0) / self.total

    def failed(self) -> int:
        return sum(count for answer, count in self.seen.items() if ": " in answer)


class Client:
    """The caller process."""

    def __init__(self, process: Process, errors: Path) -> None:
        self.process = process
        self._errors = errors
        self._ids = itertools.count()
        self._early: dict[int, dict[str, Any]] = {}
        self._reading = asyncio.Lock()

    async def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        except TimeoutError:
            line = b""
        assert line, f"no answer; its errors: {self._errors.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def calls(self, count: int = 1, **options: Any) -> Answers:
        assert self.process.stdin is not None
        number = next(self._ids)
        command = {"id": number, "count": count, **options}
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        while number not in self._early:
            async with self._reading:
                if number not in self._early:
                    answer = await self.read()
                    self._early[answer["id"]] = answer
        answer = self._early.pop(number)
        return Answers(answer["seen"], answer["seconds"])

    async def until(self, done: Callable[[Answers], bool], count: int = 40, **options: Any) -> Answers:
        """Make rows of calls until one is as wanted."""
        deadline = time.monotonic() + ANSWER_S
        while not done(answers := await self.calls(count, **options)):
            assert time.monotonic() < deadline, answers.seen
        return answers


class Traffic:
    """`async with Traffic(folder) as traffic`."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = folder
        self.host = host
        self.control: grpc.aio.Server | None = None
        self.state = folder / "state"
        self.hub = Hub()
        self.plane = Plane(self.hub)
        self.servers: dict[str, Server] = {}
        self.port = port
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.start_control()
        self._stack.push_async_callback(self.stop_control)
        return self

    async def start_control(self) -> None:
        identity = LocalCertificateSource(self.state, "control", 3600).ensure()
        server = grpc.aio.server(
            interceptors=[Pipeline("control", ServerConfig(), AllowAll())], options=NO_REUSE
        )
        add_to_server(self.hub, server)
        self.port = server.add_secure_port(f"{self.host}:{self.port}", server_credentials(identity))
        await server.start()
        self.control = server

    async def stop_control(self) -> None:
        """End it as a crash would: no stream is told."""
        if self.control is not None:
            server, self.control = self.control, None
            await server.stop(None)

    async def __aexit__(self, *_exit: object) -> None:
        for server in self.servers.values():
            await server.stop()
        await self._stack.aclose()

    async def server(self, name: str, service: str = "vectors", **labels: Any) -> Server:
        """Start an instance; `publish` makes it known."""
        server = self.servers[name] = Server(name, service, **labels)
        await server.start(self.state)
        return server

    async def start(self, *names: str) -> list[Server]:
        """Start several instances of `vectors` and make them known."""
        servers = [await self.server(name) for name in names]
        self.publish()
        return servers

    def publish(self, *names: str) -> None:
        """Make these instances known, or all."""
        by_service: dict[str, list[Instance]] = {}
        for name, server in self.servers.items():
            known = by_service.setdefault(server.service, [])
            if not names or name in names:
                known.append(server.instance())
        self.plane.set_instances(by_service)

    def policy(self, text: str, service: str = "vectors") -> None:
        self.plane.set_policies({service: Document(f"{service}.yaml", f"service: {service}\n{text}")})
        assert self.plane.policies.refusals == {}

    async def client(self, zone: str = "local", *, controls: Sequence[str] = ()) -> Client:
        identity = LocalCertificateSource(self.state, "cli", 3600).ensure()
        folder = self.folder / f"client-{zone}"
        folder.mkdir()
        for path in (identity.cert_path, identity.key_path, identity.ca_path):
            (folder / path.name).write_bytes(path.read_bytes())
        bootstrap = write_bootstrap(folder, controls or [f"localhost:{self.port}"], f"client-{zone}", zone)
        errors = folder / "errors.log"
        with errors.open("w") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(CALLER)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
            )
        self._stack.push_async_callback(_end, process)
        client = Client(process, errors)
        assert (await client.read()) == {"ready": True}
        return client

    def refusals(self) -> list[str]:
        """What clients said to resources that they did not accept."""
        return [
            subscription.refusal.text
            for client in self.hub.clients
            for subscription in client.subscriptions.values()
            if subscription.refusal is not None
        ]


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
    # Closes the pipes; without it they would be closed by the garbage collector, with a warning.
    process._transport.close()  # type: ignore[attr-defined]
