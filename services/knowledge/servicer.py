"""KnowledgeService over store, ingestion and answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plexus.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from services.knowledge import convert
from services.knowledge.answering import Answering, cited
from services.knowledge.domain import MAX_DOCUMENTS, check_query
from services.runtime.errors import InvalidArgumentError
from services.runtime.idempotency import Answers
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.knowledge.domain import Collection
    from services.knowledge.engines import Engines
    from services.knowledge.ingestion import Ingestion
    from services.knowledge.store import KnowledgeStore

DEFAULT_PASSAGES, MAX_PASSAGES = 10, 50
DEFAULT_SOURCES, MAX_SOURCES = 5, 20
_FORGET_PAGE = 100


class KnowledgeServicer(knowledge_pb2_grpc.KnowledgeServiceServicer):
    """Validates, delegates, converts."""

    def __init__(
        self, store: KnowledgeStore, engines: Engines, ingestion: Ingestion, answering: Answering
    ) -> None:
        self._store = store
        self._engines = engines
        self._ingestion = ingestion
        self._answering = answering
        self._answers = Answers()

    async def CreateCollection(
        self, request: knowledge_pb2.CreateCollectionRequest, context: Any
    ) -> knowledge_pb2.Collection:
        made = await self._answers.once(
            request, lambda: self._create(convert.collection_from(request.collection))
        )
        return convert.collection_to(made)

    async def _create(self, collection: Collection) -> Collection:
        # The engines first: a collection that is listed can be used.
        await self._engines.create_collection(collection.engine_name)
        return await self._store.create_collection(collection)

    async def GetCollection(
        self, request: knowledge_pb2.GetCollectionRequest, context: Any
    ) -> knowledge_pb2.Collection:
        return convert.collection_to(await self._store.collection(request.collection))

    async def ListCollections(
        self, request: knowledge_pb2.ListCollectionsRequest, context: Any
    ) -> knowledge_pb2.ListCollectionsResponse:
        limit = page_size(request.page_size)
        after = (decode_token(request.page_token, "collections") or b"").decode()
        found = await self._store.collections(limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].name.encode(), "collections") if len(found) > limit else ""
        return knowledge_pb2.ListCollectionsResponse(
            collections=map(convert.collection_to, found[:limit]), next_page_token=token
        )

    async def DeleteCollection(
        self, request: knowledge_pb2.DeleteCollectionRequest, context: Any
    ) -> knowledge_pb2.DeleteCollectionResponse:
        collection = await self._store.collection(request.collection)
        # What is remembered goes last: a deletion that was interrupted can be repeated.
        await self._engines.delete_collection(collection.engine_name)
        after = ""
        while documents := await self._store.documents(collection.name, limit=_FORGET_PAGE, after=after):
            for document in documents:
                for version in {document.version, document.sha256} - {""}:
                    await self._engines.discard(document.id, version)
            after = documents[-1].uri
        await self._store.delete_collection(collection.name)
        return knowledge_pb2.DeleteCollectionResponse()

    async def IngestDocuments(
        self, request: knowledge_pb2.IngestDocumentsRequest, context: Any
    ) -> knowledge_pb2.Operation:
        if not 1 <= len(request.documents) <= MAX_DOCUMENTS:
            raise InvalidArgumentError(f"needs 1 to {MAX_DOCUMENTS} documents", field="documents")
        documents = [convert.input_from(document) for document in request.documents]
        taken = await self._answers.once(request, lambda: self._ingestion.take(request.collection, documents))
        return convert.operation_to(taken)

    async def GetOperation(
        self, request: knowledge_pb2.GetOperationRequest, context: Any
    ) -> knowledge_pb2.Operation:
        return convert.operation_to(await self._store.operation(request.operation))

    async def WatchOperation(
        self, request: knowledge_pb2.WatchOperationRequest, context: Any
    ) -> AsyncIterator[knowledge_pb2.WatchOperationResponse]:
        async for operation in self._ingestion.watch(request.operation):
            yield knowledge_pb2.WatchOperationResponse(operation=convert.operation_to(operation))

    async def ListDocuments(
        self, request: knowledge_pb2.ListDocumentsRequest, context: Any
    ) -> knowledge_pb2.ListDocumentsResponse:
        limit = page_size(request.page_size)
        scope = ("documents", request.collection)
        after = (decode_token(request.page_token, *scope) or b"").decode()
        found = await self._store.documents(request.collection, limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].uri.encode(), *scope) if len(found) > limit else ""
        return knowledge_pb2.ListDocumentsResponse(
            documents=map(convert.document_to, found[:limit]), next_page_token=token
        )

    async def GetDocument(
        self, request: knowledge_pb2.GetDocumentRequest, context: Any
    ) -> knowledge_pb2.Document:
        return convert.document_to(await self._store.document(request.collection, request.document))

    async def DeleteDocument(
        self, request: knowledge_pb2.DeleteDocumentRequest, context: Any
    ) -> knowledge_pb2.DeleteDocumentResponse:
        collection = await self._store.collection(request.collection)
        document = await self._store.document(request.collection, request.document)
        await self._engines.forget(collection.engine_name, document)
        await self._store.delete_document(document.id)
        return knowledge_pb2.DeleteDocumentResponse()

    async def Search(
        self, request: knowledge_pb2.SearchRequest, context: Any
    ) -> knowledge_pb2.SearchResponse:
        query = check_query(request.query, "query")
        limit = page_size(request.limit, default=DEFAULT_PASSAGES, maximum=MAX_PASSAGES, field="limit")
        collection = await self._store.collection(request.collection)
        mode = convert.mode_from(request.mode)
        passages = await self._answering.search(collection, query, mode, limit=limit)
        return knowledge_pb2.SearchResponse(passages=map(convert.passage_to, passages))

    async def Ask(
        self, request: knowledge_pb2.AskRequest, context: Any
    ) -> AsyncIterator[knowledge_pb2.AskResponse]:
        question = check_query(request.question, "question")
        limit = page_size(request.limit, default=DEFAULT_SOURCES, maximum=MAX_SOURCES, field="limit")
        collection = await self._store.collection(request.collection)
        mode = convert.mode_from(knowledge_pb2.SEARCH_MODE_HYBRID)
        passages = await self._answering.search(collection, question, mode, limit=limit)
        shown = [convert.passage_to(passage) for passage in passages]
        yield knowledge_pb2.AskResponse(passages=knowledge_pb2.Passages(passages=shown))
        if request.HasField("generate") and not request.generate:
            yield knowledge_pb2.AskResponse(answer=knowledge_pb2.Answer(citations=shown))
            return
        answer = []
        async for sentence in self._answering.answer(question, passages, convert.style_from(request.style)):
            answer.append(sentence)
            yield knowledge_pb2.AskResponse(sentence=convert.sentence_to(sentence))
        whole = knowledge_pb2.Answer(
            sentences=map(convert.sentence_to, answer),
            citations=map(convert.passage_to, cited(passages, answer)),
        )
        yield knowledge_pb2.AskResponse(answer=whole)
