"""SearchService over a real server, with the embedded engine."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.protobuf import json_format

from plexus.search.v1 import search_pb2 as pb
from plexus.search.v1 import search_pb2_grpc
from services.search.backends.tantivy import TantivyIndex
from services.search.config import SearchConfig
from services.search.defaults import DEFAULT_INDEXES
from services.search.servicer import SearchServicer
from tests.contracts import hostile
from tests.refusals import details

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Serve

CONFIG = SearchConfig(max_batch_documents=100, max_depth=20)
FIELDS = [
    {"name": "title", "type": "FIELD_TYPE_TEXT", "analyzer": "ANALYZER_ENGLISH"},
    {"name": "body", "type": "FIELD_TYPE_TEXT"},
    {"name": "document", "type": "FIELD_TYPE_KEYWORD"},
    {"name": "size", "type": "FIELD_TYPE_INTEGER"},
    {"name": "at", "type": "FIELD_TYPE_DATE"},
]


@pytest.fixture
async def stub(tmp_path: Path, serve: Serve) -> AsyncIterator[search_pb2_grpc.SearchServiceStub]:
    async with TantivyIndex.open(tmp_path, CONFIG) as index:
        servicer = SearchServicer(index, CONFIG)
        async with serve(
            lambda server: search_pb2_grpc.add_SearchServiceServicer_to_server(servicer, server)
        ) as channel:
            yield search_pb2_grpc.SearchServiceStub(channel)


def parse(message: Any, fields: dict[str, Any]) -> Any:
    return json_format.ParseDict(fields, message)


async def create(stub: search_pb2_grpc.SearchServiceStub, name: str = "pages") -> pb.Index:
    request = parse(pb.CreateIndexRequest(), {"index": {"name": name, "fields": FIELDS}})
    return await stub.CreateIndex(request)


async def fill(stub: search_pb2_grpc.SearchServiceStub, count: int) -> None:
    documents = [
        {
            "id": f"d{n}",
            "fields": {
                "title": f"Running <{n}> on",
                "body": "a quick fox",
                "document": "ab"[n % 2],
                "size": n,
                "at": f"2026-01-{n + 1:02}T00:00:00Z",
            },
        }
        for n in range(count)
    ]
    response = await stub.IndexDocuments(
        parse(pb.IndexDocumentsRequest(), {"index": "pages", "documents": documents})
    )
    assert (response.indexed_count, list(response.errors)) == (count, [])


async def search(stub: search_pb2_grpc.SearchServiceStub, **fields: Any) -> pb.SearchResponse:
    return await stub.Search(parse(pb.SearchRequest(), {"index": "pages", **fields}))


async def test_the_life_of_an_index(stub: search_pb2_grpc.SearchServiceStub) -> None:
    made = await create(stub)
    assert [json_format.MessageToDict(entry) for entry in made.fields] == [
        {**FIELDS[1], "analyzer": "ANALYZER_DEFAULT"} if entry["name"] == "body" else entry
        for entry in FIELDS
    ]
    await create(stub, "other")
    first = await stub.ListIndexes(pb.ListIndexesRequest(page_size=1))
    second = await stub.ListIndexes(pb.ListIndexesRequest(page_size=1, page_token=first.next_page_token))
    assert [found.name for answer in (first, second) for found in answer.indexes] == ["other", "pages"]
    assert second.next_page_token == ""
    await fill(stub, 3)
    assert (await stub.GetIndex(pb.GetIndexRequest(index="pages"))).document_count == 3
    await stub.DeleteIndex(pb.DeleteIndexRequest(index="pages"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetIndex(pb.GetIndexRequest(index="pages"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)[:2] == ("INDEX_NOT_FOUND", {"index": "pages"})


async def test_a_document_is_read_back_as_given(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    fields = {"title": "x", "size": 3.0, "deep": {"list": [1.0, None, "é"], "no": {}}}
    request = {"index": "pages", "documents": [{"id": "a/b", "fields": fields}, {"id": "empty"}]}
    await stub.IndexDocuments(parse(pb.IndexDocumentsRequest(), request))
    found = await stub.GetDocument(pb.GetDocumentRequest(index="pages", document="a/b"))
    assert json_format.MessageToDict(found) == {"id": "a/b", "fields": fields}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetDocument(pb.GetDocumentRequest(index="pages", document="none"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_search_highlights_filters_counts_and_escapes(
    stub: search_pb2_grpc.SearchServiceStub,
) -> None:
    await create(stub)
    await fill(stub, 6)
    response = await search(
        stub,
        text="who runs?",
        fields=["title^2", "body"],
        filter={
            "must": [{"term": {"field": "document", "value": "b"}}, {"range": {"field": "size", "gt": 1}}]
        },
        highlight={},
        facets=[{"field": "document"}],
    )
    assert {hit.document.id for hit in response.hits} == {"d3", "d5"}
    assert response.total_count == 2
    hit = next(hit for hit in response.hits if hit.document.id == "d3")
    (highlight,) = hit.highlights
    assert highlight.html == "<mark>Running</mark> &lt;3&gt; on"
    assert [(span.start, span.end) for span in highlight.spans] == [(0, 7)]
    assert [(value.value, value.count) for value in response.facets[0].values] == [("b", 2)]
    bare = await search(stub, query="running AND size:[0 TO 1]", withoutFields=True)
    assert sorted(hit.document.id for hit in bare.hits) == ["d0", "d1"]
    assert not bare.hits[0].document.HasField("fields")


async def test_pages_follow_each_other_down_to_the_bound(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    await fill(stub, 25)
    seen: list[str] = []
    token = ""
    while True:
        response = await search(stub, sort={"field": "size"}, pageSize=8, pageToken=token)
        seen += [hit.document.id for hit in response.hits]
        assert response.total_count == 25
        if not response.next_page_token:
            break
        token = response.next_page_token
    assert seen == [f"d{n}" for n in range(20)]
    for fields in ({"query": "fox"}, {"sort": {"field": "size", "descending": True}}, {}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await search(stub, pageToken=token, **fields)
        assert details(caught.value)[0] == "INVALID_PAGE_TOKEN"


async def test_deleting_by_ids_filter_and_query(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    await fill(stub, 8)
    counts = []
    ways: list[dict[str, Any]] = [
        {"ids": ["d0", "none"]},
        {"filter": {"must": [{"term": {"field": "document", "value": "a"}}]}},
        {"query": "size:1"},
    ]
    for fields in ways:
        request = parse(pb.DeleteDocumentsRequest(), {"index": "pages", **fields})
        counts.append((await stub.DeleteDocuments(request)).deleted_count)
    assert counts == [1, 3, 1]
    assert (await search(stub)).total_count == 3


async def test_a_stream_answers_each_batch(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    batches: list[dict[str, Any]] = [
        {"index": "pages", "documents": [{"id": "a"}, {"id": "b", "fields": {"size": "x"}}]},
        {"documents": [{"id": "c"}]},
    ]
    requests = [parse(pb.StreamIndexDocumentsRequest(), batch) for batch in batches]
    answers = [answer async for answer in stub.StreamIndexDocuments(iter(requests))]
    assert [answer.indexed_count for answer in answers] == [1, 1]
    assert [(error.id, error.field) for error in answers[0].errors] == [("b", "documents[1].fields.size")]
    empty = pb.StreamIndexDocumentsRequest()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.StreamIndexDocuments(iter([*requests, empty])):
            pass
    assert (details(caught.value)[1]["batches"], details(caught.value)[2]) == ("2", ["documents"])


async def test_a_retry_with_the_same_request_id_changes_nothing(
    stub: search_pb2_grpc.SearchServiceStub,
) -> None:
    await create(stub)
    request = parse(
        pb.IndexDocumentsRequest(), {"index": "pages", "documents": [{"id": "a"}], "requestId": "r"}
    )
    await stub.IndexDocuments(request)
    await stub.DeleteDocuments(pb.DeleteDocumentsRequest(index="pages", ids=["a"]))
    assert (await stub.IndexDocuments(request)).indexed_count == 1
    assert (await search(stub)).total_count == 0


async def test_an_unreadable_query_names_its_position(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await search(stub, query="title:(quick")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value) == ("INVALID_QUERY", {"position": "12"}, ["query"])


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"query": " "}, "query"),
        ({"query": "a" * 8193}, "query"),
        ({"text": "a" * 8193}, "text"),
        ({"fields": ["none"]}, "fields[0]"),
        ({"fields": ["title", "size"]}, "fields[1]"),
        ({"fields": ["title^x"]}, "fields[0]"),
        ({"fields": ["title^nan"]}, "fields[0]"),
        ({"pageSize": -1}, "page_size"),
        ({"sort": {"field": "title"}}, "sort.field"),
        ({"highlight": {"fields": ["document"]}}, "highlight.fields[0]"),
        ({"highlight": {"maxChars": 5}}, "highlight.max_chars"),
        ({"facets": [{"field": "body"}]}, "facets[0].field"),
        ({"facets": [{"field": "document"}] * 9}, "facets"),
        ({"filter": {"must": [{}]}}, "filter.must[0]"),
        ({"filter": {"must": [{"term": {"field": "title", "value": "x"}}]}}, "filter.must[0].term.field"),
        ({"filter": {"must": [{"term": {"field": "size", "value": "x"}}]}}, "filter.must[0].term.value"),
        ({"filter": {"must": [{"term": {"field": "size"}}]}}, "filter.must[0].term.value"),
        ({"filter": {"mustNot": [{"range": {"field": "size"}}]}}, "filter.must_not[0].range"),
        (
            {"filter": {"must": [{"range": {"field": "size", "gt": 1, "gte": 1}}]}},
            "filter.must[0].range.gt",
        ),
        ({"filter": {"must": [{"range": {"field": "at", "lt": "soon"}}]}}, "filter.must[0].range.lt"),
        ({"filter": {"must": [{"range": {"field": "document", "lt": "a"}}]}}, "filter.must[0].range.field"),
        ({"filter": {"must": [{"exists": {"field": "body"}}]}}, "filter.must[0].exists.field"),
        ({"filter": {"must": [{"exists": {"field": "size"}}] * 257}}, "filter"),
    ],
)
async def test_a_bad_search_names_its_field(
    stub: search_pb2_grpc.SearchServiceStub, fields: dict[str, Any], path: str
) -> None:
    await create(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await search(stub, **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[2] == [path]


@pytest.mark.parametrize(
    ("index", "path"),
    [
        ({"name": "../x", "fields": FIELDS}, "index.name"),
        ({"name": "a"}, "index.fields"),
        ({"name": "a", "fields": [{"name": "x"}]}, "index.fields[0].type"),
        ({"name": "a", "fields": [{"name": "_id", "type": 1}]}, "index.fields[0].name"),
        ({"name": "a", "fields": [FIELDS[0], FIELDS[0]]}, "index.fields[1].name"),
        ({"name": "a", "fields": [{"name": "x", "type": 3, "analyzer": 2}]}, "index.fields[0].analyzer"),
    ],
)
async def test_a_bad_index_names_its_field(
    stub: search_pb2_grpc.SearchServiceStub, index: dict[str, Any], path: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CreateIndex(parse(pb.CreateIndexRequest(), {"index": index}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[2] == [path]


async def test_an_empty_or_too_large_batch_is_refused(stub: search_pb2_grpc.SearchServiceStub) -> None:
    await create(stub)
    for count in (0, 101):
        documents = [pb.Document(id=str(number)) for number in range(count)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.IndexDocuments(pb.IndexDocumentsRequest(index="pages", documents=documents))
        assert details(caught.value)[2] == ["documents"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeleteDocuments(pb.DeleteDocumentsRequest(index="pages"))
    assert details(caught.value)[2] == ["filter"]


async def test_the_default_indexes_are_valid_and_searchable(tmp_path: Path) -> None:
    async with TantivyIndex.open(tmp_path) as index:
        for spec in DEFAULT_INDEXES:
            assert (await index.create_index(spec)).document_count == 0
        names = [found.spec.name for found in await index.indexes(limit=9)]
    assert names == ["executions", "logs", "workflows"]


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(stub: search_pb2_grpc.SearchServiceStub) -> None:
    async def restore() -> None:
        with suppress(grpc.aio.AioRpcError):
            await create(stub)
        await fill(stub, 3)

    await restore()
    names = {"index": "pages", "field": "text", "document": "d1"}
    bases = {
        "CreateIndex": {"index": {"name": "new", "fields": FIELDS}},
        "IndexDocuments": {"index": "pages", "documents": [{"id": "d9", "fields": {"text": "a"}}]},
    }
    await hostile.probe(stub, pb.DESCRIPTOR.services_by_name["SearchService"], names, bases, restore)
