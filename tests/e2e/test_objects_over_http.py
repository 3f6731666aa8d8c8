"""Objects through the edge behave as HTTP says they do (RFC 9110)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.e2e.backend import Backend

pytestmark = pytest.mark.e2e
CONTENT = b"0123456789" * 100_000
PATH = "/v1/buckets/user-uploads/objects/http/numbers.txt"


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx.Client]:
    with backend.client() as client:
        yield client


@pytest.fixture(scope="module")
def stored(client: httpx.Client) -> httpx.Response:
    headers = {"Content-Type": "text/plain", "X-Meta-Author": "Ada", "X-Meta-Note": "50%25 caf%C3%A9"}
    answer = client.put(PATH, content=CONTENT, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_get_tells_length_type_validators_and_labels(client: httpx.Client, stored: httpx.Response) -> None:
    answer = client.get(PATH)
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["etag"] == stored.headers["etag"] == f'"{stored.json()["etag"]}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["last-modified"].endswith(" GMT")
    assert answer.headers["x-meta-author"] == "Ada"
    assert answer.headers["x-meta-note"] == "50%25 caf%C3%A9"
    assert stored.json()["metadata"] == {"author": "Ada", "note": "50% café"}
    assert not [name for name in answer.headers if name.startswith(("grpc-", "x-http-", "x-envoy-"))]


def test_head_is_get_without_the_body(client: httpx.Client, stored: httpx.Response) -> None:
    answer, whole = client.head(PATH), client.get(PATH)
    assert (answer.status_code, answer.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "last-modified", "x-meta-author"):
        assert answer.headers[name] == whole.headers[name], name
    assert client.head(PATH + ".none").status_code == 404
    assert stored.is_success


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=999990-", 999_990, 1_000_000),
        ("bytes=-5", 999_995, 1_000_000),
        ("bytes=999999-2000000", 999_999, 1_000_000),
        ("Bytes=262143-262145", 262_143, 262_146),
    ],
)
def test_a_range_is_206_and_exactly_that_part(
    client: httpx.Client, header: str, start: int, end: int
) -> None:
    answer = client.get(PATH, headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("header", ["bytes=0-1,5-6", "lines=1-2", "bytes=5-2", "bytes=-", "nonsense"])
def test_a_range_that_is_none_is_ignored(client: httpx.Client, header: str) -> None:
    answer = client.get(PATH, headers={"Range": header})
    assert (answer.status_code, len(answer.content)) == (200, len(CONTENT))


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("header", ["bytes=1000000-", "bytes=2000000-2000001", "bytes=-0"])
def test_a_range_beyond_the_end_is_416(client: httpx.Client, header: str) -> None:
    answer = client.get(PATH, headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"
    assert answer.json()["details"][0]["reason"] == "RANGE_BEYOND_END"


def test_a_download_is_resumed_only_of_the_same_content(client: httpx.Client, stored: httpx.Response) -> None:
    etag = stored.headers["etag"]
    same = client.get(PATH, headers={"Range": "bytes=5-9", "If-Range": etag})
    assert (same.status_code, same.content) == (206, CONTENT[5:10])
    other = client.get(PATH, headers={"Range": "bytes=5-9", "If-Range": '"other"'})
    assert (other.status_code, len(other.content)) == (200, len(CONTENT))


def test_a_cached_copy_is_confirmed_without_the_body(client: httpx.Client, stored: httpx.Response) -> None:
    etag = stored.headers["etag"]
    modified = client.head(PATH).headers["last-modified"]
    for headers in (
        {"If-None-Match": f'"x", {etag}'},
        {"If-None-Match": "*"},
        {"If-Modified-Since": modified},
    ):
        answer = client.get(PATH, headers=headers)
        assert (answer.status_code, answer.content) == (304, b""), headers
        assert answer.headers["etag"] == etag
    for headers in (
        {"If-None-Match": '"x"', "If-Modified-Since": modified},  # the tag decides
        {"If-Modified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"},
        {"If-Modified-Since": "not a date"},
    ):
        assert client.get(PATH, headers=headers).status_code == 200, headers


def test_a_condition_that_does_not_hold_is_412(client: httpx.Client, stored: httpx.Response) -> None:
    etag = stored.headers["etag"]
    assert client.get(PATH, headers={"If-Match": etag}).status_code == 200
    for headers in ({"If-Match": '"x"'}, {"If-Unmodified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"}):
        answer = client.get(PATH, headers=headers)
        assert answer.status_code == 412, headers
        assert answer.json()["details"][0]["reason"] == "CONDITION_FAILED"


def test_conditions_on_writes_decide_which_writer_wins(client: httpx.Client) -> None:
    path = "/v1/buckets/user-uploads/objects/http/race"
    create = {"If-None-Match": "*"}
    assert client.put(path, content=b"x", headers={"If-Match": "*"}).status_code == 412
    first = client.put(path, content=b"one", headers=create)
    assert first.status_code == 200
    assert client.put(path, content=b"two", headers=create).status_code == 412
    replaced = client.put(path, content=b"three", headers={"If-Match": f'"x", {first.headers["etag"]}'})
    assert replaced.status_code == 200
    assert client.delete(path, headers={"If-Match": first.headers["etag"]}).status_code == 412
    assert client.get(path).content == b"three"
    assert client.delete(path, headers={"If-Match": replaced.headers["etag"]}).status_code == 200
    assert client.get(path).status_code == 404


def test_an_encoded_upload_is_refused_rather_than_kept_without_its_mark(client: httpx.Client) -> None:
    path = "/v1/buckets/user-uploads/objects/http/zipped"
    answer = client.put(path, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert client.head(path).status_code == 404


def test_an_empty_object_is_complete(client: httpx.Client) -> None:
    path = "/v1/buckets/user-uploads/objects/http/empty"
    assert client.put(path, content=b"").status_code == 200
    answer = client.get(path)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert client.get(path, headers={"Range": "bytes=0-"}).status_code == 416


def test_the_range_may_stand_in_the_query(client: httpx.Client, stored: httpx.Response) -> None:
    assert stored.is_success
    answer = client.get(PATH, params={"offset": 3, "length": 4})
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"3456", "4")
    both = client.get(PATH, params={"offset": 3}, headers={"Range": "bytes=1-2"})
    assert both.status_code == 400
