"""A real Envoy in front of a real grpc.aio backend, rendered from kong_lab.yml."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import grpc_tools
import httpx
import pytest
import pytest_asyncio
from google.api import httpbody_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

from services.gateway import kong as kong_file
from services.gateway import limits
from services.gateway.credentials import CredentialStore
from services.gateway.envoy.bootstrap import Fixed
from services.gateway.envoy.descriptors import transcoded
from services.gateway.envoy.types import Edge
from services.gateway.pages import pages
from services.gateway.proxy import Proxy
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HERE = Path(__file__).parent
POISON = b"\xff\xff\xff\xff"


class Lab:
    """The lab proto, compiled for this run into a pool of its own."""

    def __init__(self, folder: Path) -> None:
        googleapis = Path(httpbody_pb2.__file__).parents[2]
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        out = folder / "lab.binpb"
        includes = [f"-I{HERE}", f"-I{googleapis}", f"-I{well_known}"]
        arguments = ["protoc", *includes, "--include_imports", f"--descriptor_set_out={out}", "lab.proto"]
        assert protoc.main(arguments) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
        self.pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self.pool.Add(file)
        self.file = self.pool.FindFileByName("lab.proto")

    def message(self, name: str) -> Any:
        """The class of a message."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))


class LabBackend:
    """LabService."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.calls = 0
        self.release = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        def decode(name: str) -> Any:
            return self._lab.message(f"plexus.lab.v1.{name}").FromString

        def encode(message: Any) -> bytes:
            return message if isinstance(message, bytes) else bytes(message.SerializeToString())

        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo, decode("EchoRequest"), encode),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, decode("WatchRequest"), encode),
            "Download": grpc.unary_stream_rpc_method_handler(self.download, decode("FileRequest"), encode),
            "Upload": grpc.stream_unary_rpc_method_handler(self.upload, decode("UploadRequest"), encode),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail, decode("FailRequest"), encode),
        }
        return grpc.method_handlers_generic_handler("plexus.lab.v1.LabService", handlers)

    def _new(self, name: str, /, **fields: Any) -> Any:
        return self._lab.message(f"plexus.lab.v1.{name}")(**fields)

    async def echo(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.calls += 1
        metadata = {k: str(v) for k, v in context.invocation_metadata() or () if not k.endswith("-bin")}
        return self._new("EchoResponse", text=request.text, metadata=metadata)

    async def watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        del context
        for number in range(request.count):
            if number == 1:
                await self.release.wait()  # the first event must reach the client before the second exists
            yield self._new("WatchResponse", number=number)

    async def download(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        del context
        body = self._lab.message("google.api.HttpBody")
        for _ in range(4):
            yield body(content_type="application/x-lab", data=b"x" * 65536)
        if request.name == "broken":
            yield POISON

    async def upload(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        del context
        name, size, messages, digest = "", 0, 0, hashlib.sha256()
        async for request in requests:
            name = name or request.name
            size += len(request.body.data)
            messages += 1
            digest.update(request.body.data)
        return self._new(
            "UploadResponse", name=name, size_bytes=size, sha256=digest.hexdigest(), messages=messages
        )

    async def fail(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        info = error_details_pb2.ErrorInfo(reason="LAB_FAILURE", domain="plexus")
        status = status_pb2.Status(code=request.code, message="failed as asked: Zürich")
        status.details.add().Pack(info)
        codes = {code.value[0]: code for code in grpc.StatusCode}
        details = (("grpc-status-details-bin", status.SerializeToString()), ("retry-after", "7"))
        await context.abort(codes[request.code], status.message, details)


@dataclass(slots=True)
class RunningEdge:
    """An edge that answers."""

    base_url: str
    port: int
    client: httpx.AsyncClient
    store: CredentialStore
    lab: Lab
    backend: LabBackend
    proxy: Proxy
    edge: Edge
    limiter: limits.Limiter
    log: Path

    def token(self, consumer: str) -> str:
        return self.store.mint_token(consumer, 600)

    def auth(self, consumer: str) -> dict[str, str]:
        """The header that makes a request this consumer's."""
        return {"authorization": f"Bearer {self.token(consumer)}"}

    def key(self, consumer: str) -> str:
        """The `iss` of a consumer."""
        return self.store.ensure([consumer])[consumer][0].key


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder whose path fits into a socket address."""
    with tempfile.TemporaryDirectory(prefix="plx") as folder:
        yield Path(folder)


@asynccontextmanager
async def running_edge(lab: Lab, folder: Path) -> AsyncIterator[RunningEdge]:
    """Backend, rate limit service and Envoy."""
    with tempfile.TemporaryDirectory(prefix="plx") as sockets:
        async with AsyncExitStack() as stack:
            backend = LabBackend(lab)
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((backend.handler(),))
            backend_port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)

            kong = kong_file.load(HERE / "kong_lab.yml")
            limiter = limits.Limiter(kong)
            limits_socket = Path(sockets) / "limits.sock"
            limits_server = grpc.aio.server()
            limits.add_to_server(limiter, limits_server)
            limits_server.add_insecure_port(f"unix:{limits_socket}")
            await limits_server.start()
            stack.push_async_callback(limits_server.stop, None)

            store = CredentialStore(folder)
            store.ensure(["alice"])
            store.ensure(["bob"], algorithm="RS256")
            store.ensure(["carol"], algorithm="ES256")
            names = [consumer.username for consumer in kong.consumers]
            descriptors, services = transcoded([lab.file])
            edge = Edge(
                kong=kong,
                credentials=store.ensure(names),
                descriptors=descriptors,
                proto_services=services,
                host="127.0.0.1",
                port=free_port(),
                limits_socket=limits_socket,
                pages=pages(),
            )
            address = ("127.0.0.1", backend_port)
            fixed = Fixed({"lab": address, "labopen": address})
            log = folder / "envoy.log"
            output = stack.enter_context(log.open("wb"))
            proxy = Proxy(folder / "edge", Path(sockets), fixed, output=output)
            stack.push_async_callback(proxy.stop, 0)
            await proxy.configure(edge)
            await proxy.start()
            await proxy.wait_ready(20)
            base_url = f"http://127.0.0.1:{edge.port}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, timeout=20))
            yield RunningEdge(base_url, edge.port, client, store, lab, backend, proxy, edge, limiter, log)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningEdge]:
    async with running_edge(lab, tmp_path_factory.mktemp("edge")) as running:
        yield running
