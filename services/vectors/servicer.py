"""VectorsService over any VectorStore and TextEmbedder."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from plexus.vectors.v1 import vectors_pb2 as pb
from plexus.vectors.v1 import vectors_pb2_grpc
from services.runtime.bounds import check_batch
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, PlexusError
from services.runtime.idempotency import Answers
from services.runtime.paging import decode_token, encode_token, page_size
from services.vectors import convert
from services.vectors.domain import CollectionSpec, Point, Query, check_id, check_vectors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.vectors.config import VectorsConfig
    from services.vectors.domain import TextEmbedder, Vector, VectorStore


class VectorsServicer(vectors_pb2_grpc.VectorsServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, store: VectorStore, embedder: TextEmbedder, config: VectorsConfig) -> None:
        self._store = store
        self._embedder = embedder
        self._config = config
        self._answers = Answers()

    async def CreateCollection(self, request: pb.CreateCollectionRequest, context: Any) -> pb.Collection:
        spec = convert.spec_from(request.collection)
        made = await self._store.create_collection(spec, request_id=request.request_id)
        return convert.collection_to(made)

    async def GetCollection(self, request: pb.GetCollectionRequest, context: Any) -> pb.Collection:
        return convert.collection_to(await self._store.collection(request.collection))

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: Any
    ) -> pb.ListCollectionsResponse:
        size = self._page_size(request.page_size)
        after = (decode_token(request.page_token, "collections") or b"").decode()
        found = await self._store.collections(after=after, limit=size + 1)
        more = len(found) > size
        return pb.ListCollectionsResponse(
            collections=map(convert.collection_to, found[:size]),
            next_page_token=encode_token(found[size - 1].spec.name.encode(), "collections") if more else "",
        )

    async def DeleteCollection(
        self, request: pb.DeleteCollectionRequest, context: Any
    ) -> pb.DeleteCollectionResponse:
        await self._store.delete_collection(request.collection)
        return pb.DeleteCollectionResponse()

    async def UpsertPoints(self, request: pb.UpsertPointsRequest, context: Any) -> pb.UpsertPointsResponse:
        count = await self._answers.once(request, lambda: self._upsert(request.collection, request.points))
        return pb.UpsertPointsResponse(upserted_count=count)

    async def StreamUpsertPoints(
        self, request_iterator: AsyncIterator[pb.StreamUpsertPointsRequest], context: Any
    ) -> pb.StreamUpsertPointsResponse:
        collection, count = "", 0
        try:
            async for request in request_iterator:
                collection = request.collection or collection
                count += await self._upsert(collection, request.points)
        except PlexusError as error:
            error.metadata["upserted_count"] = str(count)
            raise
        return pb.StreamUpsertPointsResponse(upserted_count=count)

    async def SearchPoints(self, request: pb.SearchPointsRequest, context: Any) -> pb.SearchPointsResponse:
        spec = await self._store.spec(request.collection)
        threshold = request.score_threshold if request.HasField("score_threshold") else None
        query = Query(
            vector=await self._query_vector(request, spec),
            limit=self._limit(request.limit),
            offset=self._offset(request.offset),
            filter=convert.filter_from(request.filter),
            score_threshold=threshold,
            selection=convert.selection_from(request.payload, request.vectors),
        )
        found = await self._store.search(request.collection, query)
        return pb.SearchPointsResponse(results=[convert.scored_to(hit, request.vectors) for hit in found])

    async def GetPoints(self, request: pb.GetPointsRequest, context: Any) -> pb.GetPointsResponse:
        check_batch(len(request.ids), convert.MAX_READ_IDS, "ids")
        selection = convert.selection_from(request.payload, request.vectors)
        found = await self._store.points(request.collection, request.ids, selection)
        return pb.GetPointsResponse(points=[convert.point_to(point, request.vectors) for point in found])

    async def ListPoints(self, request: pb.ListPointsRequest, context: Any) -> pb.ListPointsResponse:
        conditions = request.filter.SerializeToString(deterministic=True)
        scope = ("points", request.collection, hashlib.sha256(conditions).hexdigest())
        after = decode_token(request.page_token, *scope)
        page = await self._store.scan(
            request.collection,
            convert.filter_from(request.filter),
            convert.selection_from(request.payload, request.vectors),
            after=None if after is None else after.decode(),
            limit=self._page_size(request.page_size),
        )
        return pb.ListPointsResponse(
            points=[convert.point_to(point, request.vectors) for point in page.points],
            next_page_token=encode_token(page.next.encode(), *scope) if page.next else "",
        )

    async def DeletePoints(self, request: pb.DeletePointsRequest, context: Any) -> pb.DeletePointsResponse:
        count = await self._answers.once(request, lambda: self._delete(request))
        return pb.DeletePointsResponse(deleted_count=count)

    async def CountPoints(self, request: pb.CountPointsRequest, context: Any) -> pb.CountPointsResponse:
        matching = convert.filter_from(request.filter)
        return pb.CountPointsResponse(count=await self._store.count(request.collection, matching))

    async def _upsert(self, collection: str, points: Sequence[pb.Point]) -> int:
        spec = await self._store.spec(collection)
        drafts = convert.drafts_from(points, self._config)
        texts = [draft.text for draft in drafts if draft.text is not None]
        embedded = iter(await self._embed(spec, texts, "points") if texts else [])
        vectors = [draft.vector if draft.vector is not None else next(embedded) for draft in drafts]
        check_vectors(((f"points[{number}].vector", v) for number, v in enumerate(vectors)), spec)
        batch = [
            Point(draft.id, vector, draft.payload) for draft, vector in zip(drafts, vectors, strict=True)
        ]
        return await self._store.upsert(collection, batch)

    async def _delete(self, request: pb.DeletePointsRequest) -> int:
        if bool(request.ids) == request.HasField("filter"):
            raise InvalidArgumentError("exactly one of ids and filter must be set", field="filter")
        if request.ids:
            check_batch(len(request.ids), self._config.max_batch_points, "ids")
            for number, identifier in enumerate(request.ids):
                check_id(identifier, f"ids[{number}]")
            return await self._store.delete(request.collection, request.ids)
        matching = convert.filter_from(request.filter)
        if not matching:
            raise InvalidArgumentError("must have a condition", field="filter")
        return await self._store.delete_matching(request.collection, matching)

    async def _query_vector(self, request: pb.SearchPointsRequest, spec: CollectionSpec) -> Vector:
        match request.WhichOneof("query"):
            case "vector":
                vector = convert.vector_from(request.vector, "vector")
            case "text":
                text = convert.text_from(request.text, "text", self._config)
                (vector,) = await self._embed(spec, [text], "text")
            case _:
                raise InvalidArgumentError("has neither a vector nor a text", field="vector")
        check_vectors([("vector", vector)], spec)
        return vector

    async def _embed(self, spec: CollectionSpec, texts: Sequence[str], where: str) -> list[Vector]:
        model = convert.embedding_model(spec, where)
        vectors = await self._embedder.embed(model, texts)
        if any(len(vector) != spec.dimension for vector in vectors):
            raise FailedPreconditionError(
                f"model {model} makes vectors of {len(vectors[0])} numbers, collection {spec.name} has "
                f"{spec.dimension}",
                reason="EMBEDDING_DIMENSION",
                metadata={"collection": spec.name, "model": model},
            )
        return vectors

    def _page_size(self, asked: int) -> int:
        return page_size(asked, default=self._config.default_page_size, maximum=self._config.max_page_size)

    def _limit(self, asked: int) -> int:
        if asked < 0:
            raise InvalidArgumentError("must not be negative", field="limit")
        return min(asked or self._config.default_limit, self._config.max_page_size)

    def _offset(self, asked: int) -> int:
        if not 0 <= asked <= self._config.max_offset:
            raise InvalidArgumentError(f"must be 0 to {self._config.max_offset}", field="offset")
        return asked
