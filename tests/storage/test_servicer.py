"""StorageService over a real server."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from google.api import httpbody_pb2

from plexus.storage.v1 import storage_pb2, storage_pb2_grpc
from services.storage.backends.local import LocalObjectStore
from services.storage.servicer import StorageServicer
from tests.contracts import hostile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Serve


@pytest.fixture
async def storage(tmp_path: Path, serve: Serve) -> AsyncIterator[storage_pb2_grpc.StorageServiceStub]:
    async with (
        LocalObjectStore(tmp_path) as store,
        serve(
            lambda server: storage_pb2_grpc.add_StorageServiceServicer_to_server(
                StorageServicer(store), server
            )
        ) as channel,
    ):
        stub = storage_pb2_grpc.StorageServiceStub(channel)
        await stub.CreateBucket(storage_pb2.CreateBucketRequest(bucket="box"))
        yield stub


def _upload(key: str, *parts: bytes) -> list[storage_pb2.PutObjectRequest]:
    first, *rest = parts
    return [
        storage_pb2.PutObjectRequest(
            bucket="box", key=key, body=httpbody_pb2.HttpBody(content_type="text/plain", data=first)
        ),
        *(storage_pb2.PutObjectRequest(body=httpbody_pb2.HttpBody(data=part)) for part in rest),
    ]


async def test_an_upload_in_parts_is_downloaded_as_one(storage: storage_pb2_grpc.StorageServiceStub) -> None:
    stored = await storage.PutObject(iter(_upload("a/b c", b"one ", b"two ", b"three")))
    assert stored.size == 13
    bodies = [
        body async for body in storage.GetObject(storage_pb2.GetObjectRequest(bucket="box", key="a/b c"))
    ]
    assert bodies[0].content_type == "text/plain"
    assert b"".join(body.data for body in bodies) == b"one two three"


async def test_an_empty_object_still_has_its_type(storage: storage_pb2_grpc.StorageServiceStub) -> None:
    await storage.PutObject(iter(_upload("e", b"")))
    (body,) = [body async for body in storage.GetObject(storage_pb2.GetObjectRequest(bucket="box", key="e"))]
    assert (body.content_type, body.data) == ("text/plain", b"")


async def test_a_page_token_belongs_to_its_listing(storage: storage_pb2_grpc.StorageServiceStub) -> None:
    for key in ("a", "b", "c"):
        await storage.PutObject(iter(_upload(key, b"x")))
    page = await storage.ListObjects(storage_pb2.ListObjectsRequest(bucket="box", page_size=2))
    assert [entry.key for entry in page.objects] == ["a", "b"]
    token = page.next_page_token
    rest = await storage.ListObjects(storage_pb2.ListObjectsRequest(bucket="box", page_token=token))
    assert [entry.key for entry in rest.objects] == ["c"]
    assert rest.next_page_token == ""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage.ListObjects(storage_pb2.ListObjectsRequest(bucket="box", prefix="a", page_token=token))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_upload_without_any_message_is_refused(storage: storage_pb2_grpc.StorageServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage.PutObject(iter(()))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_repeated_creation_answers_as_the_first_did(
    storage: storage_pb2_grpc.StorageServiceStub,
) -> None:
    request = storage_pb2.CreateBucketRequest(bucket="once", request_id="r-1")
    first = await storage.CreateBucket(request)
    assert await storage.CreateBucket(request) == first
    for other in (
        storage_pb2.CreateBucketRequest(bucket="other", request_id="r-1"),
        storage_pb2.CreateBucketRequest(bucket="other", request_id="r" * 129),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await storage.CreateBucket(other)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage.CreateBucket(storage_pb2.CreateBucketRequest(bucket="once", request_id="r-2"))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(storage: storage_pb2_grpc.StorageServiceStub) -> None:
    async def restore() -> None:
        with suppress(grpc.aio.AioRpcError):
            await storage.CreateBucket(storage_pb2.CreateBucketRequest(bucket="box"))
        await storage.PutObject(iter(_upload("a", b"x")))

    await restore()
    service = storage_pb2.DESCRIPTOR.services_by_name["StorageService"]
    await hostile.probe(storage, service, {"bucket": "box", "key": "a"}, {}, restore)
