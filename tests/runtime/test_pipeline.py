"""The interceptor chain, over a real server, with the health service's methods as the RPCs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2

from plexus.client.failures import problem
from plexus.client.propagation import call_context
from plexus.inference.v1 import inference_pb2
from services.runtime import errors, status
from services.runtime.access import Decision
from services.runtime.config import ServerConfig
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.conftest import Serve

DOMAIN_ERRORS = [kind("a message", reason="SOME_REASON") for kind in status.CODES]


class DenyAll:
    def decide(self, source: str, path: str) -> Decision:
        return Decision(allowed=False, rule=f"{source} -> {path}")


def _bytes(message: bytes) -> bytes:
    return message


def handlers(
    unary: Callable[[bytes], Any] | None = None,
    stream: Callable[[bytes], AsyncIterator[Any]] | None = None,
    decode: Callable[[bytes], Any] = _bytes,
) -> Callable[[grpc.aio.Server], None]:
    """Adds /test.Echo/{Unary,Stream,ClientStream,Both} that call the given coroutine or generator."""

    async def unary_unary(request: bytes, _context: Any) -> Any:
        assert unary is not None
        return await unary(request)

    async def stream_unary(requests: AsyncIterator[bytes], _context: Any) -> Any:
        assert unary is not None
        return await unary(b"".join([part async for part in requests]))

    async def unary_stream(request: bytes, _context: Any) -> AsyncIterator[Any]:
        assert stream is not None
        async for part in stream(request):
            yield part

    async def stream_stream(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[Any]:
        assert stream is not None
        async for part in stream(b"".join([part async for part in requests])):
            yield part

    def serialize(message: Any) -> bytes:
        return message if isinstance(message, bytes) else bytes(message.SerializeToString())

    def add(server: grpc.aio.Server) -> None:
        kinds = {
            "Unary": grpc.unary_unary_rpc_method_handler(unary_unary, decode, _bytes),
            "ClientStream": grpc.stream_unary_rpc_method_handler(stream_unary, decode, _bytes),
            "Stream": grpc.unary_stream_rpc_method_handler(unary_stream, decode, serialize),
            "Both": grpc.stream_stream_rpc_method_handler(stream_stream, decode, serialize),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", kinds),))

    return add


async def _call(channel: Any, kind: str, request: bytes = b"x", **kwargs: Any) -> Any:
    if kind == "Unary":
        return await channel.unary_unary("/test.Echo/Unary")(request, **kwargs)
    if kind == "ClientStream":
        return await channel.stream_unary("/test.Echo/ClientStream")(iter([request]), **kwargs)
    if kind == "Stream":
        return [part async for part in channel.unary_stream("/test.Echo/Stream")(request, **kwargs)]
    return [part async for part in channel.stream_stream("/test.Echo/Both")(iter([request]), **kwargs)]


KINDS = ["Unary", "ClientStream", "Stream", "Both"]


def _raising(error: Exception) -> Callable[[grpc.aio.Server], None]:
    async def unary(_request: bytes) -> bytes:
        raise error

    async def stream(_request: bytes) -> AsyncIterator[bytes]:
        if error:
            raise error
        yield b""

    return handlers(unary, stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", DOMAIN_ERRORS, ids=lambda error: type(error).__name__)
async def test_each_domain_error_reaches_the_caller_with_code_reason_and_message(
    serve: Serve, kind: str, error: errors.PlexusError
) -> None:
    async with serve(_raising(error)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, kind)
    assert caught.value.code() is status.code_of(error)
    back = status.from_rpc_error(caught.value, dependency="echo")
    assert type(back) is type(error)
    assert back.reason == "SOME_REASON"
    if not isinstance(error, errors.UnavailableError):
        assert back.message == "a message"


async def test_field_violations_and_retry_delay_travel(serve: Serve) -> None:
    bad = errors.InvalidArgumentError("wrong", violations=[errors.FieldViolation("points[3].vector", "NaN")])
    async with serve(_raising(bad)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    back = status.from_rpc_error(caught.value, dependency="echo")
    assert isinstance(back, errors.InvalidArgumentError)
    assert back.violations == bad.violations

    busy = errors.ResourceExhaustedError("full", retry_after_s=1.5)
    details = status.to_status(busy).details
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details)
    assert retry.retry_delay.ToMilliseconds() == 1500
    async with serve(_raising(busy)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _call(channel, "Unary")
    assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "2"


@pytest.mark.parametrize("char", ["a", "%", "\0", "é", "\U0001f4a5"], ids=ascii)
@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_that_quotes_a_long_request_still_fits_every_client(
    serve: Serve, kind: str, char: str
) -> None:
    long = char * 100_000
    violations = [errors.FieldViolation(f"points[{long}]", long)] * 1000
    metadata = {f"name{number}": long for number in range(8)}
    error = errors.InvalidArgumentError(
        f"topic {long} is none", violations=violations, reason="BAD", metadata=metadata
    )
    async with serve(_raising(error)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, kind)
    message = caught.value.details() or ""
    assert message.startswith(f"topic {char}")
    assert message.endswith(f"{char} is none")
    found = problem(caught.value)
    assert (found.reason, len(found.metadata), found.violations[0].field[:7]) == ("BAD", 8, "points[")
    trailers = caught.value.trailing_metadata() or ()
    size = sum(
        len(key) + 32 + (len(value) * 4 // 3 if key.endswith("-bin") else len(value))
        for key, value in trailers
    )
    assert size + len(quote(message)) < 8192


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unexpected_error_is_internal_with_an_id_and_no_text(serve: Serve, kind: str) -> None:
    async with serve(_raising(ValueError("password=hunter2"))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, kind)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in str(caught.value.details())
    answer = status_pb2.Status.FromString(dict(caught.value.trailing_metadata() or ())[status.DETAILS_KEY])
    info = error_details_pb2.ErrorInfo()
    assert answer.details[0].Unpack(info)
    assert len(info.metadata["error_id"]) == 32


async def test_a_denied_caller_is_refused_before_the_handler_runs(serve: Serve) -> None:
    ran = []

    async def unary(request: bytes) -> bytes:
        ran.append(request)
        return request

    async with serve(handlers(unary), authorizer=DenyAll()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert ran == []


async def test_a_caller_without_identity_is_refused(serve: Serve) -> None:
    async with serve(_raising(ValueError()), peer="") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("peer", "expected"), [("edge", b"ann|a,b"), ("knowledge", b"|")])
async def test_consumer_headers_are_believed_only_from_the_edge(
    serve: Serve, peer: str, expected: bytes
) -> None:
    async def unary(_request: bytes) -> bytes:
        return f"{current().consumer}|{','.join(sorted(current().groups))}".encode()

    headers = (("x-consumer-username", "ann"), ("x-consumer-groups", "a, b"))
    async with serve(handlers(unary), peer=peer) as channel:
        assert await _call(channel, "Unary", metadata=headers) == expected


async def test_the_edge_cannot_call_for_nobody(serve: Serve) -> None:
    async def unary(request: bytes) -> bytes:
        return request

    async with serve(handlers(unary), peer="edge") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_calls_beyond_the_bound_are_refused_and_room_comes_back(serve: Serve) -> None:
    inside, leave = asyncio.Event(), asyncio.Event()

    async def unary(request: bytes) -> bytes:
        inside.set()
        await leave.wait()
        return request

    async with serve(handlers(unary), config=ServerConfig(max_concurrent_calls=1)) as channel:
        first = asyncio.ensure_future(_call(channel, "Unary"))
        await inside.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
        leave.set()
        assert await first == b"x"
        assert await _call(channel, "Unary") == b"x"
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_headers_as_large_as_the_edge_lets_in_are_taken(serve: Serve) -> None:
    async def echo(request: bytes) -> bytes:
        return request

    async with serve(handlers(echo)) as channel:
        for _ in range(20):  # beyond the half of its bound gRPC refuses by chance
            await _call(channel, "Unary", metadata=(("x-large", "a" * 40_000),))


async def test_a_call_without_deadline_gets_the_servers(serve: Serve) -> None:
    async def unary(_request: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with serve(handlers(unary), config=ServerConfig(default_deadline_s=0.05)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_remaining_time_and_request_id_are_known_in_the_handler(serve: Serve) -> None:
    async def unary(_request: bytes) -> bytes:
        context = call_context.get()
        assert context is not None
        remaining = context.remaining_s()
        assert remaining is not None
        assert 0 < remaining <= 21
        return context.request_id.encode()

    async with serve(handlers(unary)) as channel:
        answer = await _call(channel, "Unary", timeout=20, metadata=(("x-request-id", "r-1"),))
    assert answer == b"r-1"


REST = (("x-consumer-username", "ann"), ("x-envoy-original-path", "/v1/x"))
GRPC = REST[:1]


async def _broken_stream(serve: Serve, peer: str, headers: Any, first: Any) -> list[bytes]:
    """What arrives of a stream that fails after its first message."""

    async def stream(_request: bytes) -> AsyncIterator[Any]:
        yield first
        raise errors.DataLossError("damaged", reason="DAMAGED")

    parts: list[bytes] = []

    async def download(channel: Any) -> None:
        async for part in channel.unary_stream("/test.Echo/Stream")(b"", metadata=headers):
            parts.append(part)  # noqa: PERF401 - kept although the stream fails

    async with serve(handlers(stream=stream), peer=peer) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await download(channel)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    return parts


@pytest.mark.parametrize(
    ("peer", "headers", "poisoned"), [("edge", REST, True), ("edge", GRPC, False), ("cli", REST, False)]
)
async def test_a_download_over_rest_that_fails_midway_ends_in_a_frame_the_edge_cannot_parse(
    serve: Serve, peer: str, headers: Any, poisoned: bool
) -> None:
    parts = await _broken_stream(serve, peer, headers, httpbody_pb2.HttpBody(data=b"first"))
    assert (parts[-1] == b"\xff\xff\xff\xff") is poisoned
    assert len(parts) == 1 + poisoned


@pytest.mark.parametrize(("headers", "told"), [(REST, True), (GRPC, False)])
async def test_a_typed_stream_over_rest_that_fails_midway_says_why_in_its_last_message(
    serve: Serve, headers: Any, told: bool
) -> None:
    parts = await _broken_stream(serve, "edge", headers, inference_pb2.ChatResponse(delta="one"))
    assert inference_pb2.ChatResponse.FromString(parts[0]).delta == "one"
    assert len(parts) == 1 + told
    if told:
        last = inference_pb2.ChatResponse.FromString(parts[1]).error
        assert (last.code, last.message) == (grpc.StatusCode.DATA_LOSS.value[0], "damaged")


@pytest.mark.parametrize("reason", status.HTTP_STATUS)
@pytest.mark.parametrize(("headers", "told"), [(REST, True), (GRPC, False)])
async def test_reasons_that_http_names_better_carry_its_status_over_rest_alone(
    serve: Serve, reason: str, headers: Any, told: bool
) -> None:
    async def unary(_request: bytes) -> bytes:
        raise errors.AbortedError("no", reason=reason)

    async with serve(handlers(unary), peer="edge") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary", metadata=headers)
    said = dict(caught.value.trailing_metadata() or ()).get("x-http-status")
    assert said == (str(status.HTTP_STATUS[reason]) if told else None)


def _decode_text(data: bytes) -> bytes:
    return inference_pb2.ChatResponse.FromString(data).delta.encode()


async def _fine(request: bytes) -> bytes:
    return request


async def _fine_stream(request: bytes) -> AsyncIterator[bytes]:
    yield request


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", [b"\x0a\x02\xff\xfe", b"\x0a\xff", b"\xff" * 12])
async def test_a_malformed_message_is_the_callers_mistake(serve: Serve, kind: str, message: bytes) -> None:
    async with serve(handlers(_fine, _fine_stream, _decode_text)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, kind, message)
        error = status.from_rpc_error(caught.value, dependency="echo")
        assert isinstance(error, errors.InvalidArgumentError)
        assert error.reason == "MALFORMED_MESSAGE"
        assert await _call(channel, "Unary", b"\x0a\x02ok") == b"ok"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_over_the_bound_is_refused_with_a_reason(serve: Serve, kind: str) -> None:
    config = ServerConfig(max_message_bytes=1000)
    async with serve(handlers(_fine, _fine_stream), config=config) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, kind, b"x" * 1001)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert status.from_rpc_error(caught.value, dependency="echo").reason == "MESSAGE_TOO_LARGE"
        assert await _call(channel, "Unary", b"x" * 1000) == b"x" * 1000


async def test_a_domain_error_out_of_a_task_group_is_that_error(serve: Serve) -> None:
    async def unary(_request: bytes) -> bytes:
        async def fail(error: Exception) -> None:
            raise error

        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as group:
            group.create_task(fail(ValueError("not told")))
            group.create_task(fail(errors.NotFoundError("gone", reason="GONE")))
            outer.create_task(asyncio.sleep(60))
        return b""

    async with serve(handlers(unary)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(channel, "Unary")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "gone")
