"""SearchService over any SearchIndex."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from plexus.search.v1 import search_pb2 as pb
from plexus.search.v1 import search_pb2_grpc
from services.runtime.bounds import check_batch
from services.runtime.errors import InvalidArgumentError, PlexusError
from services.runtime.idempotency import Answers
from services.runtime.paging import decode_token, encode_token, page_size
from services.search import convert
from services.search.domain import Filter, HasId, Indexed, IndexSpec, Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.search.config import SearchConfig
    from services.search.domain import SearchIndex


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, index: SearchIndex, config: SearchConfig) -> None:
        self._index = index
        self._config = config
        self._answers = Answers()

    async def CreateIndex(self, request: pb.CreateIndexRequest, context: Any) -> pb.Index:
        spec = convert.spec_from(request.index)
        return convert.index_to(await self._index.create_index(spec, request_id=request.request_id))

    async def GetIndex(self, request: pb.GetIndexRequest, context: Any) -> pb.Index:
        return convert.index_to(await self._index.index(request.index))

    async def ListIndexes(self, request: pb.ListIndexesRequest, context: Any) -> pb.ListIndexesResponse:
        size = page_size(request.page_size, default=50, maximum=self._config.max_page_size)
        after = (decode_token(request.page_token, "indexes") or b"").decode()
        found = await self._index.indexes(after=after, limit=size + 1)
        more = len(found) > size
        return pb.ListIndexesResponse(
            indexes=map(convert.index_to, found[:size]),
            next_page_token=encode_token(found[size - 1].spec.name.encode(), "indexes") if more else "",
        )

    async def DeleteIndex(self, request: pb.DeleteIndexRequest, context: Any) -> pb.DeleteIndexResponse:
        await self._index.delete_index(request.index)
        return pb.DeleteIndexResponse()

    async def IndexDocuments(
        self, request: pb.IndexDocumentsRequest, context: Any
    ) -> pb.IndexDocumentsResponse:
        result = await self._answers.once(request, lambda: self._add(request.index, request.documents))
        return pb.IndexDocumentsResponse(indexed_count=result.indexed_count, errors=convert.errors_to(result))

    async def StreamIndexDocuments(
        self, request_iterator: AsyncIterator[pb.StreamIndexDocumentsRequest], context: Any
    ) -> AsyncIterator[pb.StreamIndexDocumentsResponse]:
        index, batches = "", 0
        async for request in request_iterator:
            index = request.index or index
            try:
                result = await self._add(index, request.documents)
            except PlexusError as error:
                error.metadata["batches"] = str(batches)
                raise
            batches += 1
            yield pb.StreamIndexDocumentsResponse(
                indexed_count=result.indexed_count, errors=convert.errors_to(result)
            )

    async def GetDocument(self, request: pb.GetDocumentRequest, context: Any) -> pb.Document:
        return convert.document_to(await self._index.document(request.index, request.document))

    async def DeleteDocuments(
        self, request: pb.DeleteDocumentsRequest, context: Any
    ) -> pb.DeleteDocumentsResponse:
        count = await self._answers.once(request, lambda: self._delete(request))
        return pb.DeleteDocumentsResponse(deleted_count=count)

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        spec = await self._index.spec(request.index)
        scope = ("search", _scope_of(request))
        position = decode_token(request.page_token, *scope) or b"0"
        offset = min(int(position), self._config.max_depth) if position.isdigit() else 0
        query = self._query_from(request, spec, offset)
        results = await self._index.search(request.index, query)
        following = query.offset + len(results.hits)
        more = results.hits and following < min(results.total_count, self._config.max_depth)
        return pb.SearchResponse(
            hits=[convert.hit_to(hit, with_fields=not request.without_fields) for hit in results.hits],
            total_count=results.total_count,
            next_page_token=encode_token(str(following).encode(), *scope) if more else "",
            facets=map(convert.facet_to, results.facets),
        )

    def _query_from(self, request: pb.SearchRequest, spec: IndexSpec, offset: int) -> Query:
        size = page_size(
            request.page_size, default=self._config.default_page_size, maximum=self._config.max_page_size
        )
        return Query(
            words=convert.words_from(request, spec),
            filter=convert.filter_from(request.filter, spec),
            sort=convert.sort_from(request.sort, spec) if request.HasField("sort") else None,
            limit=max(1, min(size, self._config.max_depth - offset)),
            offset=offset,
            highlight=convert.highlight_from(request.highlight, spec)
            if request.HasField("highlight")
            else None,
            facets=convert.facets_from(request.facets, spec),
        )

    async def _add(self, index: str, documents: Sequence[pb.Document]) -> Indexed:
        await self._index.spec(index)  # an unknown index comes before what is wrong with the batch
        check_batch(len(documents), self._config.max_batch_documents, "documents")
        return await self._index.add(index, convert.documents_from(documents))

    async def _delete(self, request: pb.DeleteDocumentsRequest) -> int:
        spec = await self._index.spec(request.index)
        matching = convert.filter_from(request.filter, spec)
        if bool(request.ids) == bool(matching or request.query):
            raise InvalidArgumentError(
                "exactly one of ids and of filter or query must be set", field="filter"
            )
        if request.ids:
            check_batch(len(request.ids), self._config.max_batch_documents, "ids")
            matching = Filter(must=(HasId(tuple(request.ids)),))
        words = convert.words_of(request.query, "query") if request.query else None
        return await self._index.delete(request.index, Query(words, matching))


def _scope_of(request: pb.SearchRequest) -> str:
    """A digest of everything in a search that decides what its pages hold."""
    same = pb.SearchRequest()
    same.CopyFrom(request)
    for name in ("page_token", "page_size", "highlight", "facets", "without_fields"):
        same.ClearField(name)
    return hashlib.sha256(same.SerializeToString(deterministic=True)).hexdigest()
