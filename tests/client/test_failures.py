"""What a failed call tells a program, over a real server, by both of gRPC's Python interfaces."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

import plexus.client
from plexus.client.channel import MeshChannel
from services.runtime import errors
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WRONG = errors.InvalidArgumentError(
    "points[3].vector: has 2 numbers, not 3",
    reason="WRONG_DIMENSION",
    metadata={"collection": "films"},
    violations=[errors.FieldViolation("points[3].vector", "has 2 numbers, not 3")],
)
BUSY = errors.ResourceExhaustedError("full", reason="QUEUE_FULL", retry_after_s=1.5)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server whose methods fail in known ways."""

    async def wrong(_request: bytes, _context: Any) -> bytes:
        raise WRONG

    async def busy(_request: bytes, _context: Any) -> bytes:
        raise BUSY

    async def damaged(_request: bytes, context: Any) -> bytes:
        trailers = (("grpc-status-details-bin", b"\xff\xff not a message"),)
        return bytes(await context.abort(grpc.StatusCode.NOT_FOUND, "gone", trailers))

    async def silent(_request: bytes, _context: Any) -> bytes:
        return bytes(await asyncio.Event().wait())

    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(method)
        for name, method in {"Wrong": wrong, "Busy": busy, "Damaged": damaged, "Silent": silent}.items()
    }
    server = grpc.aio.server(interceptors=[Pipeline("test", ServerConfig(), AllowAll(), trusted_peer="cli")])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Fails", handlers),))
    bound = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield bound
    await server.stop(grace=0)


async def failed(port: int, method: str, timeout_s: float = 30.0) -> plexus.client.Problem:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = MeshChannel(channel, timeout_s=timeout_s).unary_unary(f"/test.Fails/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            await call(b"", metadata=[("x-request-id", "asked-for")])
    return plexus.client.problem(caught.value)


async def test_reason_domain_metadata_and_fields(port: int) -> None:
    problem = await failed(port, "Wrong")
    assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
    assert problem.message == WRONG.message
    assert (problem.reason, problem.domain) == ("WRONG_DIMENSION", "plexus")
    assert problem.metadata == {"collection": "films"}
    assert problem.violations == (plexus.client.Violation("points[3].vector", "has 2 numbers, not 3"),)
    assert problem.retry_after_s is None
    assert problem.request_id == "asked-for"


async def test_when_to_try_again(port: int) -> None:
    problem = await failed(port, "Busy")
    assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert problem.retry_after_s == 1.5


async def test_details_that_cannot_be_read_leave_the_status(port: int) -> None:
    problem = await failed(port, "Damaged")
    assert (problem.code, problem.message) == (grpc.StatusCode.NOT_FOUND, "gone")
    assert (problem.reason, problem.violations) == ("", ())


async def test_the_channels_own_deadline_ends_a_call_that_gave_none(port: int) -> None:
    problem = await failed(port, "Silent", timeout_s=0.2)
    assert (problem.code, problem.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "")


async def test_errors_of_the_blocking_interface_too(port: int) -> None:
    def call() -> plexus.client.Problem:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_unary("/test.Fails/Wrong")
            with pytest.raises(grpc.RpcError) as caught:
                method(b"", timeout=30)
            return plexus.client.problem(caught.value)

    problem = await asyncio.to_thread(call)
    assert problem.violations[0].field == "points[3].vector"
