"""What a stranger may send: each is refused with a typed error, at once, and nothing is lost or hung."""

from __future__ import annotations

import base64
import gzip
import hmac
import http.client
import json
import math
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest

from services.gateway.credentials import CredentialStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
MIB = 1024 * 1024
POINTS = "/v1/vectors/collections/bad/points"
OBJECTS = "/v1/buckets/user-uploads/objects"


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx.Client]:
    with backend.client() as client:
        made = client.post(
            "/v1/vectors/collections",
            json={"name": "bad", "dimension": 3, "distance": "DISTANCE_COSINE"},
        )
        assert made.is_success, made.text
        yield client


def _reason(answer: httpx.Response, status: int) -> str:
    """The reason of a refusal, after checks of the one shape that all have."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"code", "message", "details"}
    assert body["message"]
    (info,) = [detail for detail in body["details"] if detail["@type"].endswith("google.rpc.ErrorInfo")]
    assert info["domain"] == "plexus"
    reason: str = info["reason"]
    return reason


def _head(client: httpx.Client, method: str, path: str, *headers: str) -> bytes:
    """The head of a request, for a client of our own that misbehaves after it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {client.headers['authorization']}"]
    return ("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode()


def _fields(answer: httpx.Response) -> list[str]:
    return [
        violation["field"]
        for detail in answer.json()["details"]
        for violation in detail.get("fieldViolations", ())
    ]


def _count(client: httpx.Client) -> int:
    return int(client.post(f"{POINTS}:count", json={}).json()["count"])


def _upsert(client: httpx.Client, *vectors: Any) -> httpx.Response:
    points = [{"id": f"p{number}", "vector": vector} for number, vector in enumerate(vectors)]
    return client.post(f"{POINTS}:upsert", json={"points": points})


def _packed(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


GOOD: dict[str, Any] = {"values": [1, 2, 3]}


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param({"values": [1, 2]}, id="dimension"),
        pytest.param({"values": [1, "NaN", 3]}, id="nan"),
        pytest.param({"values": [1, "Infinity", 3]}, id="infinity"),
        pytest.param({"packed": _packed(1, math.nan, 3)}, id="packed-nan"),
        pytest.param({"packed": base64.b64encode(b"12345").decode()}, id="packed-odd"),
        pytest.param({"values": []}, id="empty"),
        pytest.param({**GOOD, "packed": _packed(1, 2, 3)}, id="both"),
    ],
)
def test_a_wrong_vector_names_its_field_and_nothing_of_the_batch_is_stored(
    client: httpx.Client, vector: dict[str, Any]
) -> None:
    before = _count(client)
    answer = _upsert(client, GOOD, vector)
    _reason(answer, 400)
    assert any(field.startswith("points[1]") for field in _fields(answer)), answer.text
    assert _count(client) == before


def test_an_empty_batch_is_refused(client: httpx.Client) -> None:
    answer = client.post(f"{POINTS}:upsert", json={"points": []})
    _reason(answer, 400)
    assert _fields(answer) == ["points"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/vectors/collections/none/points:search", {"vector": GOOD}),
        ("POST", "/v1/vectors/collections/none/points:upsert", {"points": [{"id": "a", "vector": GOOD}]}),
        ("POST", "/v1/knowledge/collections/none:ask", {"question": "Who?"}),
        ("POST", "/v1/indexes/none:search", {"query": "word"}),
        ("POST", "/v1/topics/none:publish", {"messages": [{"data": ""}]}),
        ("GET", "/v1/buckets/none/objects/key", None),
    ],
)
def test_what_does_not_exist_is_404_with_its_own_reason(
    client: httpx.Client, method: str, path: str, body: Any
) -> None:
    reason = _reason(client.request(method, path, json=body), 404)
    assert reason.endswith("_NOT_FOUND")
    assert reason != "ROUTE_NOT_FOUND"


@pytest.mark.parametrize(
    "path",
    [
        f"{POINTS}:upsert",
        "/v1/inference:embed",
        "/v1/knowledge/collections/none/documents:ingest",
        "/v1/embeddings",
        "/v1/indexes/logs:search",
    ],
)
def test_a_hundred_megabytes_of_text_are_refused_while_they_come(
    backend: Backend, client: httpx.Client, path: str
) -> None:
    sent = 0

    def endless_text() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"texts": ["'
        for _ in range(100):
            sent += MIB
            yield b"a" * MIB
        yield b'"]}'

    connection = socket.create_connection(("127.0.0.1", backend.port), timeout=60)
    with connection, connection.makefile("rb") as answers:
        connection.sendall(
            _head(client, "POST", path, "Content-Type: application/json", "Transfer-Encoding: chunked")
        )
        try:
            for piece in endless_text():
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # the edge has answered and closed
        status_line = answers.readline().decode()
    assert " 413 " in status_line
    assert sent < 100 * MIB, "all of it was taken before it was refused"
    assert client.get("/v1/models").is_success


def test_a_message_over_the_services_bound_is_413_too(client: httpx.Client) -> None:
    body = {"documents": [{"id": "a", "fields": {"message": "word " * (4 * MIB)}}]}
    answer = client.post("/v1/indexes/logs/documents:index", json=body)
    assert _reason(answer, 413) == "MESSAGE_TOO_LARGE"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b'{"points": 1}', id="type"),
        pytest.param(b"[1, 2]", id="array"),
        pytest.param(b'{"points": [{"id": "\xff\xfe"}]}', id="utf-8"),
        pytest.param(b'{"points": [{"id": "\\ud800"}]}', id="surrogate"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"\x00\x01\x02", id="binary"),
        pytest.param(gzip.compress(b'{"points": []}'), id="gzip"),
    ],
)
def test_malformed_json_is_a_400(client: httpx.Client, content: bytes) -> None:
    answer = client.post(f"{POINTS}:upsert", content=content, headers={"Content-Type": "application/json"})
    _reason(answer, 400)


def test_a_gzip_bomb_is_never_unpacked(backend: Backend, client: httpx.Client) -> None:
    bomb = gzip.compress(b" " * (512 * MIB), compresslevel=9)
    before = backend.rows()
    answer = client.post(
        f"{POINTS}:upsert",
        content=bomb,
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    _reason(answer, 400)
    after = backend.rows()
    for name, row in after.items():
        assert row["pid"] == before[name]["pid"], name
        assert row["pss_bytes"] - before[name]["pss_bytes"] < 128 * MIB, name


@pytest.mark.parametrize(
    "key",
    ["..", "../..", "../../etc/passwd", "a/../b", "%2e%2e/%2e%2e/x", "a b", "a//b", "ünï", ".", "a/"],
)
def test_any_key_is_a_name_and_never_a_path(backend: Backend, client: httpx.Client, key: str) -> None:
    # A client's library and the edge resolve a bare `..` before it is a key at all; escaped, it may be one.
    escaped = "".join(f"%{byte:02X}" for byte in f"bad/{key}".encode())
    connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=30)
    headers = {"Authorization": client.headers["authorization"]}
    content = key.encode()
    try:
        connection.request("PUT", f"{OBJECTS}/{escaped}", body=content, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            assert answer.status in {400, 404}, body
            assert json.loads(body)["details"]
            return
        stored = json.loads(body)["key"]
        connection.request("GET", f"{OBJECTS}/{escaped}", headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, content)
    finally:
        connection.close()
    listed = client.get(f"{OBJECTS}", params={"page_size": 1000}).json()["objects"]
    assert stored in [entry["key"] for entry in listed]
    outside = [path for path in backend.state.rglob("*") if path.name in {"passwd", "x"}]
    assert outside == []


@pytest.mark.parametrize("key", ["nul%00byte", "k" * 2000, "%ff%fe"])
def test_a_key_that_is_none_names_the_field(client: httpx.Client, key: str) -> None:
    answer = client.put(f"{OBJECTS}/{key}", content=b"x")
    assert answer.status_code == 400, answer.text
    _reason(answer, 400)


def test_a_page_token_of_another_listing_is_refused(client: httpx.Client) -> None:
    for number in range(3):
        assert client.put(f"{OBJECTS}/pages/{number}", content=b"x").is_success
    page = client.get(OBJECTS, params={"prefix": "pages/", "page_size": 1}).json()
    token = page["nextPageToken"]
    assert token
    assert client.get(OBJECTS, params={"prefix": "pages/", "page_token": token}).is_success
    for path, params in (
        (OBJECTS, {"prefix": "other/"}),
        ("/v1/buckets", {}),
        ("/v1/topics", {}),
        ("/v1/vectors/collections", {}),
        ("/v1/knowledge/collections", {}),
    ):
        for wrong in (token, "not a token", token[:-4]):
            answer = client.get(path, params={**params, "page_token": wrong})
            _reason(answer, 400)
            assert _fields(answer) == ["page_token"], path


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _hmac(digest: str, header: str, payload: str, secret: str) -> bytes:
    return hmac.digest(secret.encode(), f"{header}.{payload}".encode(), digest)


def _tokens(backend: Backend) -> Iterator[tuple[str, str]]:
    store = CredentialStore(backend.state)
    (demo, *_), (reader, *_) = store.ensure(["demo"])["demo"], store.ensure(["reader"])["reader"]
    rsa = store.add("reader", "RS256")
    now = int(time.time())
    claims = {"iss": demo.key, "nbf": now - 5, "exp": now + 60}
    assert demo.secret
    assert reader.secret
    yield "expired", jwt.encode({**claims, "exp": now - 5}, demo.secret, algorithm="HS256")
    yield "not yet valid", jwt.encode({**claims, "nbf": now + 60}, demo.secret, algorithm="HS256")
    yield "no expiry", jwt.encode({"iss": demo.key, "nbf": now}, demo.secret, algorithm="HS256")
    yield "wrong key", jwt.encode(claims, reader.secret, algorithm="HS256")
    yield "unknown issuer", jwt.encode({**claims, "iss": "nobody"}, demo.secret, algorithm="HS256")
    header, payload = _b64(b'{"alg":"HS384","typ":"JWT"}'), _b64(json.dumps(claims).encode())
    yield "another algorithm", f"{header}.{payload}.{_b64(_hmac('SHA384', header, payload, demo.secret))}"
    for none in ("none", "None", "nOnE"):
        header = _b64(json.dumps({"alg": none, "typ": "JWT"}).encode())
        yield none, f"{header}.{_b64(json.dumps(claims).encode())}."
    # The public key of RS256 used as the secret of HS256.
    public = json.dumps(rsa.jwk())
    header = _b64(b'{"alg":"HS256","typ":"JWT"}')
    payload = _b64(json.dumps({**claims, "iss": rsa.key}).encode())
    yield "algorithm confusion", f"{header}.{payload}.{_b64(_hmac('SHA256', header, payload, public))}"
    good = store.mint_token("demo")
    yield "cut", good[:-3]
    yield (
        "changed",
        good.replace(good.split(".")[1], _b64(json.dumps({**claims, "exp": now + 9999}).encode())),
    )


def test_a_token_that_proves_nothing_is_401(backend: Backend, client: httpx.Client) -> None:
    assert client.get("/v1/models").is_success
    for what, token in _tokens(backend):
        answer = httpx.get(f"{backend.url}/v1/models", headers={"Authorization": f"Bearer {token}"})
        assert _reason(answer, 401) == "UNAUTHENTICATED", what
        assert answer.headers["www-authenticate"].startswith("Bearer"), what
    assert _reason(httpx.get(f"{backend.url}/v1/models"), 401) == "UNAUTHENTICATED"


def test_a_client_that_stops_reading_costs_only_itself(backend: Backend, client: httpx.Client) -> None:
    big = "bad/slow-reader"
    assert client.put(f"{OBJECTS}/{big}", content=b"x" * (64 * MIB)).is_success
    before = backend.rows()
    stalled = []
    try:
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", backend.port), timeout=30)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(_head(client, "GET", f"{OBJECTS}/{big}"))
            assert connection.recv(12) == b"HTTP/1.1 200"
            stalled.append(connection)
        for _ in range(20):  # others are served meanwhile, from the same service
            assert client.get(f"{OBJECTS}/{big}", headers={"Range": "bytes=0-9"}).content == b"x" * 10
        after = backend.rows()
        for name in ("storage", "edge"):
            grown = after[name]["pss_bytes"] - before[name]["pss_bytes"]
            assert grown < 64 * MIB, f"{name} holds what its reader does not take: {grown // MIB} MiB"
    finally:
        for connection in stalled:
            connection.close()


def test_an_upload_that_breaks_off_leaves_nothing(backend: Backend, client: httpx.Client) -> None:
    path = f"{OBJECTS}/bad/cut-upload"
    connection = socket.create_connection(("127.0.0.1", backend.port), timeout=30)
    with connection:
        connection.sendall(_head(client, "PUT", path, "Content-Length: 1000000") + b"x" * 1000)
    assert client.get(path).status_code == 404
    assert client.put(path, content=b"whole").is_success
    assert client.get(path).content == b"whole"
