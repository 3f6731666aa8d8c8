"""StorageService over any ObjectStore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.api import httpbody_pb2

from plexus.storage.v1 import storage_pb2, storage_pb2_grpc
from services.runtime.errors import InvalidArgumentError, OutOfRangeError
from services.runtime.idempotency import Answers
from services.runtime.paging import decode_token, encode_token, page_size
from services.runtime.request import current
from services.storage import convert
from services.storage.domain import DEFAULT_CONTENT_TYPE, PutOptions
from services.storage.faces import http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.storage.domain import ObjectStore

MAX_DELETES = 1000


class StorageServicer(storage_pb2_grpc.StorageServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._answers = Answers()

    async def CreateBucket(
        self, request: storage_pb2.CreateBucketRequest, context: Any
    ) -> storage_pb2.Bucket:
        made = await self._answers.once(request, lambda: self._store.create_bucket(request.bucket))
        return convert.bucket_to(made)

    async def GetBucket(self, request: storage_pb2.GetBucketRequest, context: Any) -> storage_pb2.Bucket:
        return convert.bucket_to(await self._store.get_bucket(request.bucket))

    async def ListBuckets(
        self, request: storage_pb2.ListBucketsRequest, context: Any
    ) -> storage_pb2.ListBucketsResponse:
        limit = page_size(request.page_size)
        after = (decode_token(request.page_token, "buckets") or b"").decode()
        buckets = await self._store.list_buckets(limit=limit + 1, after=after)
        more = len(buckets) > limit
        return storage_pb2.ListBucketsResponse(
            buckets=map(convert.bucket_to, buckets[:limit]),
            next_page_token=encode_token(buckets[limit - 1].name.encode(), "buckets") if more else "",
        )

    async def DeleteBucket(
        self, request: storage_pb2.DeleteBucketRequest, context: Any
    ) -> storage_pb2.DeleteBucketResponse:
        await self._store.delete_bucket(request.bucket, force=request.force)
        return storage_pb2.DeleteBucketResponse()

    async def PutObject(
        self, requests: AsyncIterator[storage_pb2.PutObjectRequest], context: Any
    ) -> storage_pb2.Object:
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidArgumentError("the upload has no message", field="bucket")
        options = PutOptions(
            content_type=first.body.content_type or DEFAULT_CONTENT_TYPE,
            metadata=dict(first.metadata),
            sha256=first.sha256,
            if_match=first.if_match,
            if_absent=first.if_absent,
        )

        rest = current().rest
        if rest is not None:
            options = await http.write_options(self._store, rest, first.bucket, first.key, options)

        async def content() -> AsyncIterator[bytes]:
            yield first.body.data
            async for request in requests:
                yield request.body.data

        stored = await self._store.put(first.bucket, first.key, content(), options)
        if rest is not None:
            await context.send_initial_metadata((("etag", f'"{stored.etag}"'),))
        return convert.object_to(stored)

    async def GetObject(
        self, request: storage_pb2.GetObjectRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        rest = current().rest
        if rest is None:
            stored, content = await self._store.get(
                request.bucket, request.key, offset=request.offset, length=request.length or None
            )
            first = await anext(aiter(content), b"")
        else:
            try:
                stored, part, content = await http.read(
                    self._store,
                    rest,
                    request.bucket,
                    request.key,
                    offset=request.offset,
                    length=request.length,
                )
            except OutOfRangeError as error:
                context.set_trailing_metadata((("content-range", f"bytes */{error.metadata['size']}"),))
                raise
            first = await anext(aiter(content), b"")
            # Only now: had the first block been damaged, the answer would still be a plain error.
            await context.send_initial_metadata(http.response_headers(stored, part))
        # The first message stands even for an empty object: it carries the content type.
        yield httpbody_pb2.HttpBody(content_type=stored.content_type, data=first)
        async for data in content:
            yield httpbody_pb2.HttpBody(data=data)

    async def HeadObject(self, request: storage_pb2.HeadObjectRequest, context: Any) -> storage_pb2.Object:
        return convert.object_to(await self._store.head(request.bucket, request.key))

    async def ListObjects(
        self, request: storage_pb2.ListObjectsRequest, context: Any
    ) -> storage_pb2.ListObjectsResponse:
        scope = ("objects", request.bucket, request.prefix, request.delimiter)
        listing = await self._store.list_objects(
            request.bucket,
            prefix=request.prefix,
            delimiter=request.delimiter,
            limit=page_size(request.page_size),
            position=decode_token(request.page_token, *scope),
        )
        position = listing.next_position
        return storage_pb2.ListObjectsResponse(
            objects=map(convert.object_to, listing.objects),
            prefixes=listing.prefixes,
            next_page_token="" if position is None else encode_token(position, *scope),
        )

    async def DeleteObject(
        self, request: storage_pb2.DeleteObjectRequest, context: Any
    ) -> storage_pb2.DeleteObjectResponse:
        rest = current().rest
        etag = ""
        if rest is not None:
            etag = await http.delete_condition(self._store, rest, request.bucket, request.key)
        await self._store.delete(request.bucket, [request.key], if_match=etag)
        return storage_pb2.DeleteObjectResponse()

    async def DeleteObjects(
        self, request: storage_pb2.DeleteObjectsRequest, context: Any
    ) -> storage_pb2.DeleteObjectsResponse:
        if not 1 <= len(request.keys) <= MAX_DELETES:
            raise InvalidArgumentError(f"needs 1 to {MAX_DELETES} keys", field="keys")
        deleted = await self._store.delete(request.bucket, request.keys)
        return storage_pb2.DeleteObjectsResponse(deleted=deleted)
