"""A disk that fills up: writes are refused by that name, reads go on, and room is all it takes to recover."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.disk import small_disk
from tests.e2e.backend import Backend, eventually
from tests.models import model_folder
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
MIB = 1024 * 1024
OBJECTS = "/v1/buckets/user-uploads/objects"
WRITES: dict[str, tuple[str, str, Any]] = {
    "vectors": (
        "POST",
        "/v1/vectors/collections/notes/points:upsert",
        {"points": [{"id": "new", "vector": {"values": [1, 0]}}]},
    ),
    "search": (
        "POST",
        "/v1/indexes/logs/documents:index",
        {"documents": [{"id": "new", "fields": {"message": "new"}}]},
    ),
    "queueing": ("POST", "/v1/topics/notes:publish", {"messages": [{"data": "bmV3"}] * 50}),
    "storage": ("PUT", f"{OBJECTS}/new", b"n" * MIB),
}


@pytest.fixture
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with small_disk(tmp_path_factory.mktemp("disk") / "small", size_mib=256) as folder:
        made = Backend(folder, free_port())
        (made.state / "models").symlink_to(model_folder(), target_is_directory=True)
        try:
            made.up()
            yield made
        finally:
            made.down()


def _write(client: httpx.Client, service: str) -> httpx.Response:
    method, path, body = WRITES[service]
    if isinstance(body, bytes):
        return client.request(method, path, content=body)
    return client.request(method, path, json=body)


def _writes(client: httpx.Client, service: str) -> bool:
    return _write(client, service).is_success


def _fill(backend: Backend) -> None:
    """Leave nothing; the pages that engines have mapped already are theirs."""
    with (backend.state / "filler").open("wb") as file:
        try:
            while True:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, 64 * 1024)
        except OSError:
            return


def test_a_full_disk_refuses_writes_and_everything_works_once_there_is_room(backend: Backend) -> None:
    before = backend.wait_serving()
    with backend.client() as client:
        made = client.post("/v1/vectors/collections", json={"name": "notes", "dimension": 2})
        assert made.is_success, made.text
        assert client.post("/v1/topics", json={"topic": "notes"}).is_success
        assert client.post("/v1/subscriptions", json={"name": "notes", "topic": "notes"}).is_success
        assert client.put(f"{OBJECTS}/kept", content=b"kept").is_success
        assert _write(client, "vectors").is_success

        _fill(backend)
        for service in WRITES:
            refusals = [_write(client, service)]
            # A write may still fit into room that the engine has set aside, until that is used up.
            while refusals[-1].is_success and len(refusals) < 400:
                refusals.append(_write(client, service))
            answer = refusals[-1]
            assert answer.status_code == 507, f"{service}: {answer.status_code} {answer.text}"
            assert answer.json()["details"][0]["reason"] == "DISK_FULL", service
        assert client.get(f"{OBJECTS}/kept").content == b"kept"
        found = client.post(
            "/v1/vectors/collections/notes/points:search", json={"vector": {"values": [1, 0]}, "limit": 1}
        )
        assert [entry["point"]["id"] for entry in found.json()["results"]] == ["new"], found.text
        during = backend.rows()
        assert {name: row["pid"] for name, row in during.items()} == {
            name: row["pid"] for name, row in before.items()
        }, "a full disk ended a process"

        (backend.state / "filler").unlink()
        for service in WRITES:
            eventually(partial(_writes, client, service), explain=backend.log_tail)
    backend.plexus("down")
    backend.up()
    with backend.client() as client:
        assert client.get(f"{OBJECTS}/kept").content == b"kept"
        assert client.get(f"{OBJECTS}/new").content == b"n" * MIB
