"""The other services, as knowledge needs them: each method is one idea, whatever RPCs it takes."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import numpy as np
from google.api import httpbody_pb2

from plexus.inference.v1 import inference_pb2, inference_pb2_grpc
from plexus.queueing.v1 import queueing_pb2, queueing_pb2_grpc
from plexus.search.v1 import search_pb2, search_pb2_grpc
from plexus.storage.v1 import storage_pb2, storage_pb2_grpc
from plexus.vectors.v1 import vectors_pb2, vectors_pb2_grpc
from services.runtime.errors import AlreadyExistsError, DeadlineExceededError, NotFoundError
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence

    from numpy.typing import NDArray

    from plexus.client.channel import Mesh
    from services.knowledge.domain import Chunk, Document, Task

BUCKET = "knowledge"
TOPIC = SUBSCRIPTION = "knowledge-ingest"
DIMENSION = 384
_BATCH = 256
_EMBED = 16
"""Texts of one call: some batches of like lengths, and still a matter of seconds."""
_EMBED_TRIES = 5
"""A call that took too long is repeated alone, so that what else was embedded of the document is not lost."""
_EMBED_CALLS = 4
_EMBED_S = 120.0
_PART = 512 * 1024
_BROKER_ATTEMPTS = 1000  # the most there is: ingestion itself says when a document is given up, and why

T = TypeVar("T")


async def _told(call: Awaitable[T], dependency: str) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, dependency=dependency) from error


def _keys(task_document: str, version: str) -> tuple[str, str]:
    return f"{task_document}/{version}/original", f"{task_document}/{version}/text"


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk as an engine gave it: document, version and position, and everything a passage shows."""

    document: str
    version: str
    chunk: int
    start: int
    end: int
    headings: tuple[str, ...]
    text: str
    score: float


def _fields(document: str, version: str, chunk: Chunk) -> dict[str, Any]:
    return {
        "document": document,
        "version": version,
        "chunk": chunk.number,
        "start": chunk.start,
        "end": chunk.end,
        "headings": " > ".join(chunk.headings),
        "text": chunk.text,
    }


def _found(fields: Any, score: float) -> Found:
    headings = str(fields["headings"])
    return Found(
        document=str(fields["document"]),
        version=str(fields["version"]),
        chunk=int(fields["chunk"]),
        start=int(fields["start"]),
        end=int(fields["end"]),
        headings=tuple(headings.split(" > ")) if headings else (),
        text=str(fields["text"]),
        score=score,
    )


class Engines:
    """Storage, queueing, inference, vectors and search behind one door."""

    def __init__(self, mesh: Mesh) -> None:
        self._storage = mesh.stub(storage_pb2_grpc.StorageServiceStub)
        self.queueing = mesh.stub(queueing_pb2_grpc.QueueingServiceStub)
        self._inference = mesh.stub(inference_pb2_grpc.InferenceServiceStub)
        self._bulk = asyncio.Semaphore(_EMBED_CALLS)
        self._vectors = mesh.stub(vectors_pb2_grpc.VectorsServiceStub)
        self._search = mesh.stub(search_pb2_grpc.SearchServiceStub)

    async def prepare(self) -> None:
        """Make the bucket, topic and subscription that ingestion needs; repeating it changes nothing."""
        await _ignore_existing(
            _told(self._storage.CreateBucket(storage_pb2.CreateBucketRequest(bucket=BUCKET)), "storage")
        )
        await _ignore_existing(
            _told(self.queueing.CreateTopic(queueing_pb2.CreateTopicRequest(topic=TOPIC)), "queueing")
        )
        subscription = queueing_pb2.Subscription(
            name=SUBSCRIPTION, topic=TOPIC, retry=queueing_pb2.RetryPolicy(max_attempts=_BROKER_ATTEMPTS)
        )
        request = queueing_pb2.CreateSubscriptionRequest(subscription=subscription)
        await _ignore_existing(_told(self.queueing.CreateSubscription(request), "queueing"))

    # Storage.

    async def store(self, document: str, version: str, content: bytes, content_type: str) -> None:
        """Keep an original."""
        await self._put(_keys(document, version)[0], content, content_type)

    async def store_text(self, document: str, version: str, text: str) -> None:
        """Keep an extracted text, to which the offsets of chunks refer."""
        await self._put(_keys(document, version)[1], text.encode(), "text/markdown; charset=utf-8")

    async def _put(self, key: str, content: bytes, content_type: str) -> None:
        async def parts() -> AsyncIterator[storage_pb2.PutObjectRequest]:
            for start in range(0, len(content) or 1, _PART):
                body = httpbody_pb2.HttpBody(content_type=content_type, data=content[start : start + _PART])
                yield storage_pb2.PutObjectRequest(bucket=BUCKET, key=key, body=body)

        await _told(self._storage.PutObject(parts()), "storage")

    async def original(self, task: Task) -> bytes:
        """Read an original."""
        key = _keys(task.document, task.sha256)[0]
        try:
            request = storage_pb2.GetObjectRequest(bucket=BUCKET, key=key)
            return b"".join([body.data async for body in self._storage.GetObject(request)])
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, dependency="storage") from error

    async def discard(self, document: str, version: str) -> None:
        """Delete what is stored of a version."""
        request = storage_pb2.DeleteObjectsRequest(bucket=BUCKET, keys=_keys(document, version))
        await _told(self._storage.DeleteObjects(request), "storage")

    # Queueing.

    async def publish(self, tasks: Sequence[str]) -> None:
        """Queue tasks; one that is queued twice is delivered once."""
        messages = [queueing_pb2.Message(data=task.encode(), dedup_id=task) for task in tasks]
        await _told(
            self.queueing.Publish(queueing_pb2.PublishRequest(topic=TOPIC, messages=messages)), "queueing"
        )

    # Inference.

    async def embed(self, texts: Sequence[str], *, bulk: bool = False) -> NDArray[np.float32]:
        """Vectors of texts: float32, one unit row each.

        Args:
            texts: The texts.
            bulk: They can wait for those of questions. All bulk work together has only so many calls under
                way, so that each of them ends soon, however much there is to do and however slow the machine.
        """

        async def part(start: int) -> list[NDArray[np.float32]]:
            request = inference_pb2.EmbedRequest(texts=texts[start : start + _EMBED], background=bulk)
            for left in reversed(range(_EMBED_TRIES if bulk else 1)):
                try:
                    async with self._bulk if bulk else nullcontext():
                        response = await _told(self._inference.Embed(request, timeout=_EMBED_S), "inference")
                    break
                except DeadlineExceededError:
                    if not left:
                        raise
            return [np.frombuffer(vector.packed, "<f4") for vector in response.vectors]

        parts = [asyncio.create_task(part(start)) for start in range(0, len(texts), _EMBED)]
        try:
            rows = [row for rows in await asyncio.gather(*parts) for row in rows]
        finally:
            for task in parts:
                task.cancel()  # of no effect on those that are done
        return np.stack(rows) if rows else np.zeros((0, DIMENSION), np.float32)

    async def chat(self, system: str, question: str, *, max_tokens: int) -> AsyncGenerator[str]:
        """The pieces of an answer."""
        request = inference_pb2.ChatRequest(
            messages=[
                inference_pb2.Message(role=inference_pb2.ROLE_SYSTEM, content=system),
                inference_pb2.Message(role=inference_pb2.ROLE_USER, content=question),
            ],
            temperature=0,
            max_tokens=max_tokens,
        )
        try:
            async for response in self._inference.Chat(request):
                if response.delta:
                    yield response.delta
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, dependency="inference") from error

    # Vectors and search.

    async def create_collection(self, name: str) -> None:
        """Make the engines' parts of a collection; repeating it changes nothing."""
        collection = vectors_pb2.Collection(
            name=name,
            dimension=DIMENSION,
            distance=vectors_pb2.DISTANCE_COSINE,
            payload_indexes=[
                vectors_pb2.PayloadIndex(field=field, type=vectors_pb2.PAYLOAD_TYPE_KEYWORD)
                for field in ("document", "version")
            ],
        )
        request = vectors_pb2.CreateCollectionRequest(collection=collection)
        await _ignore_existing(_told(self._vectors.CreateCollection(request), "vectors"))
        kinds = {
            "document": search_pb2.FIELD_TYPE_KEYWORD,
            "version": search_pb2.FIELD_TYPE_KEYWORD,
            "headings": search_pb2.FIELD_TYPE_TEXT,
            "text": search_pb2.FIELD_TYPE_TEXT,
            "chunk": search_pb2.FIELD_TYPE_INTEGER,
            "start": search_pb2.FIELD_TYPE_INTEGER,
            "end": search_pb2.FIELD_TYPE_INTEGER,
        }
        fields = [
            search_pb2.Field(
                name=field,
                type=kind,
                analyzer=search_pb2.ANALYZER_ENGLISH
                if kind == search_pb2.FIELD_TYPE_TEXT
                else search_pb2.ANALYZER_UNSPECIFIED,
            )
            for field, kind in kinds.items()
        ]
        index = search_pb2.CreateIndexRequest(index=search_pb2.Index(name=name, fields=fields))
        await _ignore_existing(_told(self._search.CreateIndex(index), "search"))

    async def delete_collection(self, name: str) -> None:
        """Delete the engines' parts of a collection; repeating it changes nothing."""
        vectors = self._vectors.DeleteCollection(vectors_pb2.DeleteCollectionRequest(collection=name))
        await _ignore_missing(_told(vectors, "vectors"))
        index = self._search.DeleteIndex(search_pb2.DeleteIndexRequest(index=name))
        await _ignore_missing(_told(index, "search"))

    async def index(
        self,
        collection: str,
        document: str,
        version: str,
        chunks: Sequence[Chunk],
        vectors: NDArray[np.float32],
    ) -> None:
        """Write chunks to both engines; durable on return."""
        for start in range(0, len(chunks), _BATCH):
            points, documents = [], []
            for position in range(start, min(start + _BATCH, len(chunks))):
                chunk = chunks[position]
                fields = _fields(document, version, chunk)
                identifier = f"{document}:{version[:16]}:{chunk.number}"
                packed = vectors_pb2.Vector(packed=vectors[position].astype("<f4").tobytes())
                point = vectors_pb2.Point(id=identifier, vector=packed)
                point.payload.update(fields)
                points.append(point)
                entry = search_pb2.Document(id=identifier)
                entry.fields.update(fields)
                documents.append(entry)
            upsert = vectors_pb2.UpsertPointsRequest(collection=collection, points=points)
            await _told(self._vectors.UpsertPoints(upsert, timeout=120), "vectors")
            write = search_pb2.IndexDocumentsRequest(index=collection, documents=documents)
            await _told(self._search.IndexDocuments(write, timeout=120), "search")

    async def remove(self, collection: str, document: str, *, keep_version: str = "") -> None:
        """Delete the chunks of a document from both engines, but for one version's."""
        must, must_not = vectors_pb2.Filter(), []
        must.must.append(_vector_match("document", document))
        if keep_version:
            must_not.append(_vector_match("version", keep_version))
        must.must_not.extend(must_not)
        points = vectors_pb2.DeletePointsRequest(collection=collection, filter=must)
        await _ignore_missing(_told(self._vectors.DeletePoints(points), "vectors"))
        terms = search_pb2.Filter(must=[_search_term("document", document)])
        if keep_version:
            terms.must_not.append(_search_term("version", keep_version))
        documents = search_pb2.DeleteDocumentsRequest(index=collection, filter=terms)
        await _ignore_missing(_told(self._search.DeleteDocuments(documents), "search"))

    async def dense(self, collection: str, vector: NDArray[np.float32], *, limit: int) -> list[Found]:
        """Chunks nearest in meaning."""
        request = vectors_pb2.SearchPointsRequest(
            collection=collection,
            vector=vectors_pb2.Vector(packed=vector.astype("<f4").tobytes()),
            limit=limit,
        )
        response = await _told(self._vectors.SearchPoints(request), "vectors")
        return [_found(result.point.payload, result.score) for result in response.results]

    async def lexical(self, collection: str, text: str, *, limit: int) -> list[Found]:
        """Chunks that share words."""
        request = search_pb2.SearchRequest(
            index=collection, text=text, fields=["text", "headings"], page_size=limit
        )
        response = await _told(self._search.Search(request), "search")
        return [_found(hit.document.fields, hit.score) for hit in response.hits]

    async def forget(self, collection: str, document: Document) -> None:
        """Delete everything made of a document."""
        await self.remove(collection, document.id)
        for version in {document.version, document.sha256} - {""}:
            await self.discard(document.id, version)


def _vector_match(field: str, value: str) -> vectors_pb2.Condition:
    match = vectors_pb2.Match(field=field)
    match.value.string_value = value
    return vectors_pb2.Condition(match=match)


def _search_term(field: str, value: str) -> search_pb2.Condition:
    term = search_pb2.Term(field=field)
    term.value.string_value = value
    return search_pb2.Condition(term=term)


async def _ignore_existing(call: Awaitable[object]) -> None:
    try:
        await call
    except AlreadyExistsError:
        return


async def _ignore_missing(call: Awaitable[object]) -> None:
    try:
        await call
    except NotFoundError:
        return
