"""What the edge does with admitted requests: translation, streams, bodies, limits, errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.gateway.conftest import RunningEdge

pytestmark = pytest.mark.asyncio(loop_scope="module")
MIB = 1 << 20


async def _chunks(size: int, chunk: int = 65536) -> AsyncIterator[bytes]:
    yield b'{"text": "'
    for _ in range(size // chunk):
        yield b"x" * chunk


async def test_json_reaches_the_backend_and_comes_back(edge: RunningEdge) -> None:
    answer = await edge.client.post(
        "/v1/lab/echo", json={"text": "hé", "numbers": [1]}, headers=edge.auth("alice")
    )
    assert answer.status_code == 200
    assert answer.json()["text"] == "hé"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["server"] == "plexus"


async def test_malformed_json_is_400_with_the_parsers_reason(edge: RunningEdge) -> None:
    answer = await edge.client.post("/v1/lab/echo", content=b'{"text": ', headers=edge.auth("alice"))
    assert answer.status_code == 400
    assert answer.json()["code"] == 3
    assert answer.json()["message"] not in {"", "Bad request"}
    unknown = await edge.client.get("/v1/lab/echo/hi?nonsense=1", headers=edge.auth("alice"))
    assert unknown.status_code == 400
    assert "nonsense" in unknown.json()["message"]


async def test_a_body_that_contradicts_the_path_is_refused(edge: RunningEdge) -> None:
    path, headers = "/v1/lab/echo/path", edge.auth("alice")
    for body in ({}, {"text": "path"}):
        answer = await edge.client.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["text"]) == (200, "path")
    calls = edge.backend.calls
    answer = await edge.client.post(path, json={"text": "body"}, headers=headers)
    assert (answer.status_code, edge.backend.calls) == (400, calls)
    assert "conflicting" in answer.json()["message"]


async def test_gzip_bomb_is_not_unpacked(edge: RunningEdge) -> None:
    import gzip  # noqa: PLC0415 - one use

    bomb = gzip.compress(b'{"text":"' + b"a" * (64 * MIB) + b'"}')
    headers = {**edge.auth("alice"), "content-encoding": "gzip", "content-type": "application/json"}
    answer = await edge.client.post("/v1/lab/echo", content=bomb, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["code"] == 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/", 404),
        ("GET", "/v1/lab/nowhere", 404),
        ("DELETE", "/v1/lab/echo", 404),
        ("POST", "/healthz", 404),
        ("GET", "/v1/absent/echo/x", 503),
    ],
)
async def test_every_refusal_has_one_shape(edge: RunningEdge, method: str, path: str, status: int) -> None:
    answer = await edge.client.request(method, path, headers=edge.auth("alice"))
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"code", "message", "details"}
    assert body["details"][0]["domain"] == "plexus"
    assert body["details"][1]["requestId"] == answer.headers["x-request-id"]
    assert "127.0.0.1" not in answer.text


async def test_backends_error_keeps_status_text_and_details(edge: RunningEdge) -> None:
    for code, status in ((3, 400), (5, 404), (7, 403), (8, 429), (9, 400), (13, 500), (14, 503), (16, 401)):
        answer = await edge.client.get(f"/v1/lab/fail/{code}", headers=edge.auth("alice"))
        assert answer.status_code == status
        body = answer.json()
        assert body.get("code") == code, (code, body, answer.headers)
        assert body["message"] == "failed as asked: Zürich"
        assert body["details"][0]["reason"] == "LAB_FAILURE"
        assert answer.headers["retry-after"] == "7"
        assert answer.headers["content-type"] == "application/json"


async def test_too_many_headers_bytes_are_431(edge: RunningEdge) -> None:
    answer = await edge.client.get("/healthz", headers={"x-big": "a" * 40_000})
    assert answer.status_code == 431
    assert answer.json()["details"][0]["reason"] == "HEADERS_TOO_LARGE"


async def test_body_over_the_routes_limit_is_413_by_length_and_by_count(edge: RunningEdge) -> None:
    calls = edge.backend.calls
    whole = await edge.client.post("/v1/lab/echo", content=b"x" * (MIB + 1), headers=edge.auth("alice"))
    assert whole.status_code == 413
    assert whole.json()["message"] == "Request size limit exceeded"
    chunked = await edge.client.post("/v1/lab/echo", content=_chunks(2 * MIB), headers=edge.auth("alice"))
    assert chunked.status_code == 413
    assert chunked.json()["code"] == 3
    raw = await edge.client.put("/v1/lab/files/big", content=_chunks(9 * MIB), headers=edge.auth("alice"))
    assert raw.status_code == 413
    assert edge.backend.calls == calls


async def test_json_between_the_default_buffer_and_the_limit_passes(edge: RunningEdge) -> None:
    text = "a" * (900 * 1024)
    answer = await edge.client.post("/v1/lab/echo", json={"text": text}, headers=edge.auth("alice"))
    assert answer.status_code == 200
    assert answer.json()["text"] == text


async def test_raw_upload_is_streamed_whole(edge: RunningEdge) -> None:
    data = bytes(range(256)) * (6 * MIB // 256)
    answer = await edge.client.put("/v1/lab/files/a/b%20c.bin", content=data, headers=edge.auth("alice"))
    assert answer.status_code == 200
    body = answer.json()
    assert body["name"] == "a/b c.bin"
    assert int(body["sizeBytes"]) == len(data)
    assert body["sha256"] == hashlib.sha256(data).hexdigest()
    assert body["messages"] > 3


async def test_raw_download_arrives_whole_with_its_type(edge: RunningEdge) -> None:
    answer = await edge.client.get("/v1/lab/files/whole", headers=edge.auth("alice"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-lab"
    assert len(answer.content) == 4 * 65536


async def test_download_that_fails_midway_never_looks_complete_on_http_1_1(edge: RunningEdge) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await edge.client.get("/v1/lab/files/broken", headers=edge.auth("alice"))


async def test_typed_stream_arrives_as_events_one_by_one(edge: RunningEdge) -> None:
    edge.backend.release.clear()
    async with edge.client.stream("GET", "/v1/lab/watch?count=2", headers=edge.auth("alice")) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        first = await asyncio.wait_for(anext(lines), 10)
        edge.backend.release.set()
        assert json.loads(first.removeprefix("data: ")) == {"number": 0}
        rest = [line async for line in lines if line]
    assert [json.loads(line.removeprefix("data: "))["number"] for line in rest] == [1]


async def test_health_and_pages_need_no_token_and_load_nothing_from_elsewhere(edge: RunningEdge) -> None:
    health = await edge.client.get("/healthz")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    docs = await edge.client.get("/docs")
    assert docs.status_code == 200
    assert docs.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    assert "http://" not in docs.text
    assert "https://" not in docs.text
    openapi = await edge.client.get("/openapi.json")
    assert openapi.status_code == 200
    assert openapi.headers["content-type"] == "application/json"
    assert openapi.json()


async def test_preflight_is_answered_without_a_token(edge: RunningEdge) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin in ("https://app.example", "http://localhost:5173"):
        answer = await edge.client.options("/v1/lab/echo", headers={**asked, "origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        assert answer.headers["access-control-max-age"] == "600"
    for origin in (
        "https://evil.example",
        "https://app.example.evil.example",
        "http://localhost:1.evil.example",
    ):
        refused = await edge.client.options("/v1/lab/echo", headers={**asked, "origin": origin})
        assert refused.status_code == 200
        assert "access-control-allow-origin" not in refused.headers


async def test_browser_can_read_a_refusal(edge: RunningEdge) -> None:
    answer = await edge.client.get("/v1/lab/echo/hi", headers={"origin": "https://app.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


async def test_request_id_is_kept_or_made(edge: RunningEdge) -> None:
    kept = await edge.client.get("/v1/lab/echo/hi", headers={**edge.auth("alice"), "x-request-id": "mine"})
    assert kept.headers["x-request-id"] == "mine"
    assert kept.json()["metadata"]["x-request-id"] == "mine"
    made = await edge.client.get("/v1/lab/echo/hi", headers=edge.auth("alice"))
    assert len(made.headers["x-request-id"]) == 36


async def test_rate_limit_counts_per_consumer_with_kongs_headers(edge: RunningEdge) -> None:
    for left in (2, 1, 0):
        answer = await edge.client.get("/v1/limited/echo/hi", headers=edge.auth("alice"))
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-hour"] == "3"
        assert answer.headers["x-ratelimit-remaining-hour"] == str(left)
        assert answer.headers["ratelimit-limit"] == "3"
        assert answer.headers["ratelimit-remaining"] == str(left)
        assert "retry-after" not in answer.headers
    refused = await edge.client.get("/v1/limited/echo/hi", headers=edge.auth("alice"))
    assert refused.status_code == 429
    assert refused.json()["code"] == 8
    assert refused.json()["message"] == "API rate limit exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 3600
    assert refused.headers["x-ratelimit-remaining-day"] == "7"
    other = await edge.client.get("/v1/limited/echo/hi", headers=edge.auth("bob"))
    assert other.headers["x-ratelimit-remaining-hour"] == "2"


async def test_consumers_own_limit_counts_over_all_routes(edge: RunningEdge) -> None:
    first = await edge.client.get("/v1/limited/echo/hi", headers=edge.auth("dave"))
    assert first.headers["x-ratelimit-limit-hour"] == "1"
    second = await edge.client.get("/v1/limited/echo/hi", headers=edge.auth("dave"))
    assert second.status_code == 429


async def _grpc(edge: RunningEdge, token: str | None, path: str = "/plexus.lab.v1.LabService/Echo") -> Any:
    request, response = (
        edge.lab.message("plexus.lab.v1.EchoRequest"),
        edge.lab.message("plexus.lab.v1.EchoResponse"),
    )
    metadata = [("authorization", f"Bearer {token}")] if token else []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        call = channel.unary_unary(path, request.SerializeToString, response.FromString)
        return await call(request(text="hi"), metadata=metadata, timeout=10)


async def test_native_grpc_passes_with_the_same_token(edge: RunningEdge) -> None:
    answer = await _grpc(edge, edge.token("alice"))
    assert answer.text == "hi"
    assert answer.metadata["x-consumer-username"] == "alice"


@pytest.mark.parametrize(
    ("consumer", "path", "code", "reason"),
    [
        (None, "lab.v1.LabService/Echo", grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
        ("bob", "lab.v1.LabService/Echo", grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
        ("alice", "nowhere.v1.Service/Echo", grpc.StatusCode.UNIMPLEMENTED, "ROUTE_NOT_FOUND"),
    ],
)
async def test_refusals_of_native_grpc_carry_code_and_reason(
    edge: RunningEdge, consumer: str | None, path: str, code: grpc.StatusCode, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _grpc(edge, edge.token(consumer) if consumer else None, f"/plexus.{path}")
    assert caught.value.code() is code
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "plexus")
    assert status.message == caught.value.details()
    assert not status.message.startswith("{")
