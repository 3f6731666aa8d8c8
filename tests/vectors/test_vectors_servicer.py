"""VectorsService over a real server, with the embedded store."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.protobuf import json_format

from plexus.vectors.v1 import vectors_pb2 as pb
from plexus.vectors.v1 import vectors_pb2_grpc
from services.runtime.errors import NotFoundError, UnavailableError
from services.vectors.backends.qdrant_edge import QdrantEdgeStore
from services.vectors.config import VectorsConfig
from services.vectors.servicer import VectorsServicer
from tests.contracts import hostile
from tests.refusals import details

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from services.vectors.domain import Vector
    from tests.conftest import Serve

CONFIG = VectorsConfig(max_batch_points=100, max_text_bytes=1000, max_payload_bytes=1000)


class LetterEmbedder:
    """Counts a, b and c; its model `wide` makes vectors of four numbers."""

    async def embed(self, model: str, texts: Sequence[str]) -> list[Vector]:
        if model == "away":
            raise UnavailableError("inference is unavailable", dependency="inference")
        if model not in ("letters", "wide"):
            raise NotFoundError(f"no model {model}", reason="MODEL_NOT_FOUND")
        return [
            [float(text.count(letter)) for letter in ("abcd" if model == "wide" else "abc")] for text in texts
        ]


@pytest.fixture
async def stub(tmp_path: Path, serve: Serve) -> AsyncIterator[vectors_pb2_grpc.VectorsServiceStub]:
    async with _served(tmp_path, serve) as stub:
        yield stub


@asynccontextmanager
async def _served(folder: Path, serve: Serve) -> AsyncIterator[vectors_pb2_grpc.VectorsServiceStub]:
    async with QdrantEdgeStore.open(folder, CONFIG) as store:
        servicer = VectorsServicer(store, LetterEmbedder(), CONFIG)
        async with serve(
            lambda server: vectors_pb2_grpc.add_VectorsServiceServicer_to_server(servicer, server)
        ) as channel:
            yield vectors_pb2_grpc.VectorsServiceStub(channel)


async def create(
    stub: vectors_pb2_grpc.VectorsServiceStub, name: str = "docs", **fields: Any
) -> pb.Collection:
    collection = pb.Collection(name=name, **{"dimension": 3, "embedding_model": "letters", **fields})
    return await stub.CreateCollection(pb.CreateCollectionRequest(collection=collection))


def point(identifier: str, *values: float, **payload: Any) -> pb.Point:
    message = pb.Point(id=identifier, vector=pb.Vector(values=values))
    message.payload.update(payload)
    return message


def parse(message: Any, fields: dict[str, Any]) -> Any:
    return json_format.ParseDict(fields, message)


async def test_the_life_of_a_collection(stub: vectors_pb2_grpc.VectorsServiceStub) -> None:
    made = await create(
        stub, payload_indexes=[pb.PayloadIndex(field="document", type=pb.PAYLOAD_TYPE_KEYWORD)]
    )
    assert (made.distance, made.point_count) == (pb.DISTANCE_COSINE, 0)
    await create(stub, "other", distance=pb.DISTANCE_EUCLID)
    first = await stub.ListCollections(pb.ListCollectionsRequest(page_size=1))
    second = await stub.ListCollections(
        pb.ListCollectionsRequest(page_size=1, page_token=first.next_page_token)
    )
    assert [found.name for page in (first, second) for found in page.collections] == ["docs", "other"]
    assert second.next_page_token == ""
    await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=[point("p", 1, 0, 0)]))
    assert (await stub.GetCollection(pb.GetCollectionRequest(collection="docs"))).point_count == 1
    await stub.DeleteCollection(pb.DeleteCollectionRequest(collection="docs"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetCollection(pb.GetCollectionRequest(collection="docs"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)[:2] == ("COLLECTION_NOT_FOUND", {"collection": "docs"})


async def test_vectors_travel_as_numbers_or_packed_and_come_back_as_asked(
    stub: vectors_pb2_grpc.VectorsServiceStub,
) -> None:
    await create(stub, distance=pb.DISTANCE_DOT)
    packed = struct.pack("<3f", 0.5, -2, 3)
    points = [point("a", 0.5, -2, 3), pb.Point(id="b", vector=pb.Vector(packed=packed))]
    await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=points))
    for form, expected in (
        (pb.VECTOR_FORMAT_VALUES, pb.Vector(values=[0.5, -2, 3])),
        (pb.VECTOR_FORMAT_PACKED, pb.Vector(packed=packed)),
    ):
        response = await stub.GetPoints(pb.GetPointsRequest(collection="docs", ids=["a", "b"], vectors=form))
        assert [found.vector for found in response.points] == [expected, expected]
    response = await stub.GetPoints(pb.GetPointsRequest(collection="docs", ids=["a"]))
    assert not response.points[0].HasField("vector")


async def test_text_is_embedded_for_points_and_queries(stub: vectors_pb2_grpc.VectorsServiceStub) -> None:
    await create(stub)
    points = [
        pb.Point(id="text", text="aab"),
        point("vector", 0, 0, 1, note="c"),
        pb.Point(id="more", text="bbb"),
    ]
    response = await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=points))
    assert response.upserted_count == 3
    found = await stub.SearchPoints(
        pb.SearchPointsRequest(collection="docs", text="b", score_threshold=0.4, limit=5)
    )
    assert [hit.point.id for hit in found.results] == ["more", "text"]
    assert found.results[0].score == pytest.approx(1)


async def test_a_search_filters_and_selects(stub: vectors_pb2_grpc.VectorsServiceStub) -> None:
    await create(stub)
    points = [point(f"p{n}", 1, n, 0, document="ab"[n % 2], n=n, tags=["x"] * n) for n in range(6)]
    await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=points))
    request = parse(
        pb.SearchPointsRequest(),
        {
            "collection": "docs",
            "vector": {"values": [1, 0, 0]},
            "filter": {
                "must": [{"match": {"field": "document", "value": "a"}}, {"exists": {"field": "tags"}}],
                "mustNot": [{"range": {"field": "n", "gt": 3}}],
            },
            "payload": {"include": ["n"]},
        },
    )
    response = await stub.SearchPoints(request)
    assert [(hit.point.id, json_format.MessageToDict(hit.point.payload)) for hit in response.results] == [
        ("p2", {"n": 2})
    ]
    count = await stub.CountPoints(pb.CountPointsRequest(collection="docs", filter=request.filter))
    assert count.count == 1


async def test_listing_pages_and_refuses_a_token_of_another_listing(
    stub: vectors_pb2_grpc.VectorsServiceStub,
) -> None:
    await create(stub)
    points = [point(f"p{n}", 1, n, 0) for n in range(7)]
    await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=points))
    seen, token = [], ""
    while True:
        page = await stub.ListPoints(pb.ListPointsRequest(collection="docs", page_size=3, page_token=token))
        seen += [found.id for found in page.points]
        if not page.next_page_token:
            break
        token = page.next_page_token
    assert sorted(seen) == [f"p{n}" for n in range(7)]
    has_id = pb.Filter(must=[pb.Condition(has_id=pb.HasId(ids=["p1"]))])
    for request in (
        pb.ListPointsRequest(collection="docs", filter=has_id, page_token=token),
        pb.ListPointsRequest(collection="docs", page_token="garbage"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListPoints(request)
        assert details(caught.value)[0] == "INVALID_PAGE_TOKEN"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListCollections(pb.ListCollectionsRequest(page_token=token))
    assert details(caught.value)[0] == "INVALID_PAGE_TOKEN"


async def test_deleting_by_ids_and_by_filter(stub: vectors_pb2_grpc.VectorsServiceStub) -> None:
    await create(stub)
    points = [point(f"p{n}", 1, n, 0, document="ab"[n % 2]) for n in range(6)]
    await stub.UpsertPoints(pb.UpsertPointsRequest(collection="docs", points=points))
    by_id = await stub.DeletePoints(pb.DeletePointsRequest(collection="docs", ids=["p0", "none"]))
    matching = parse(pb.Filter(), {"must": [{"match": {"field": "document", "value": "a"}}]})
    by_filter = await stub.DeletePoints(pb.DeletePointsRequest(collection="docs", filter=matching))
    assert (by_id.deleted_count, by_filter.deleted_count) == (1, 2)


async def test_a_stream_stores_each_batch_and_an_error_tells_how_far_it_came(
    stub: vectors_pb2_grpc.VectorsServiceStub,
) -> None:
    await create(stub)
    batches = [
        pb.StreamUpsertPointsRequest(collection="docs", points=[point("a", 1, 0, 0), point("b", 1, 0, 0)]),
        pb.StreamUpsertPointsRequest(points=[point("c", 1, 0, 0)]),
    ]
    assert (await stub.StreamUpsertPoints(iter(batches))).upserted_count == 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StreamUpsertPoints(
            iter([batches[0], pb.StreamUpsertPointsRequest(points=[point("bad", 1)]), batches[1]])
        )
    reason, metadata, fields = details(caught.value)
    assert (reason, metadata["upserted_count"], fields) == ("INVALID_VECTOR", "2", ["points[0].vector"])


async def test_a_retry_with_the_same_request_id_changes_nothing(
    stub: vectors_pb2_grpc.VectorsServiceStub,
) -> None:
    await create(stub)
    first = pb.UpsertPointsRequest(collection="docs", points=[point("a", 1, 0, 0)], request_id="r")
    await stub.UpsertPoints(first)
    await stub.DeletePoints(pb.DeletePointsRequest(collection="docs", ids=["a"]))
    assert (await stub.UpsertPoints(first)).upserted_count == 1
    assert (await stub.CountPoints(pb.CountPointsRequest(collection="docs"))).count == 0
    other = pb.UpsertPointsRequest(collection="docs", points=[point("b", 1, 0, 0)], request_id="r")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpsertPoints(other)
    assert details(caught.value)[0] == "REQUEST_ID_REUSED"


VECTOR = {"values": [1, 0, 0]}
DEEP: dict[str, Any] = {"exists": {"field": "a"}}
for _ in range(9):
    DEEP = {"filter": {"must": [DEEP]}}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"points": []}, "points"),
        ({"points": [{"id": "a", "vector": VECTOR}] * 101}, "points"),
        ({"points": [{"id": "", "vector": VECTOR}]}, "points[0].id"),
        ({"points": [{"id": "é" * 129, "vector": VECTOR}]}, "points[0].id"),
        ({"points": [{"id": "a"}]}, "points[0].vector"),
        ({"points": [{"id": "a", "vector": {}}]}, "points[0].vector"),
        ({"points": [{"id": "a", "vector": {"values": [1], "packed": "AAAA"}}]}, "points[0].vector"),
        ({"points": [{"id": "a", "vector": {"packed": "AAA="}}]}, "points[0].vector.packed"),
        (
            {"points": [{"id": "a", "vector": VECTOR}, {"id": "b", "vector": {"values": [1]}}]},
            "points[1].vector",
        ),
        ({"points": [{"id": "a", "vector": {"values": ["NaN", 0, 0]}}]}, "points[0].vector"),
        ({"points": [{"id": "a", "vector": {"values": [0, "-Infinity", "Infinity"]}}]}, "points[0].vector"),
        ({"points": [{"id": "a", "vector": {"values": [0, 0, 0]}}]}, "points[0].vector"),
        ({"points": [{"id": "a", "text": "ddd"}]}, "points[0].vector"),
        ({"points": [{"id": "a", "text": " "}]}, "points[0].text"),
        ({"points": [{"id": "a", "text": "a" * 1001}]}, "points[0].text"),
        ({"points": [{"id": "a", "vector": VECTOR, "payload": {"_plexus_id": 1}}]}, "points[0].payload"),
        ({"points": [{"id": "a", "vector": VECTOR, "payload": {"x": "y" * 1001}}]}, "points[0].payload"),
    ],
)
async def test_a_bad_upsert_names_its_field_and_stores_nothing(
    stub: vectors_pb2_grpc.VectorsServiceStub, fields: dict[str, Any], path: str
) -> None:
    await create(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpsertPoints(parse(pb.UpsertPointsRequest(), {"collection": "docs", **fields}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[2] == [path]
    assert (await stub.CountPoints(pb.CountPointsRequest(collection="docs"))).count == 0


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "vector"),
        ({"vector": {"values": [1]}}, "vector"),
        ({"vector": {"values": [0, 0, 0]}}, "vector"),
        ({"text": ""}, "text"),
        ({"vector": VECTOR, "limit": -1}, "limit"),
        ({"vector": VECTOR, "offset": 10_001}, "offset"),
        ({"vector": VECTOR, "payload": {"include": ["a"], "exclude": ["b"]}}, "payload.exclude"),
        ({"vector": VECTOR, "payload": {"include": ["a..b"]}}, "payload.include[0]"),
        ({"vector": VECTOR, "filter": {"must": [{}]}}, "filter.must[0]"),
        (
            {"vector": VECTOR, "filter": {"should": [{"match": {"field": "a b", "value": 1}}]}},
            "filter.should[0].match.field",
        ),
        ({"vector": VECTOR, "filter": {"must": [{"match": {"field": "a"}}]}}, "filter.must[0].match.value"),
        (
            {"vector": VECTOR, "filter": {"mustNot": [{"match": {"field": "a", "value": None}}]}},
            "filter.must_not[0].match.value",
        ),
        ({"vector": VECTOR, "filter": {"must": [{"range": {"field": "a"}}]}}, "filter.must[0].range"),
        (
            {"vector": VECTOR, "filter": {"must": [{"range": {"field": "a", "gt": "NaN"}}]}},
            "filter.must[0].range.gt",
        ),
        (
            {"vector": VECTOR, "filter": {"must": [{"exists": {"field": "_plexus_id"}}]}},
            "filter.must[0].exists.field",
        ),
        ({"vector": VECTOR, "filter": {"must": [{"exists": {"field": "a"}}] * 257}}, "filter"),
        (
            {"vector": VECTOR, "filter": {"must": [DEEP]}},
            "filter.must[0]" + ".filter.must[0]" * 7 + ".filter",
        ),
    ],
)
async def test_a_bad_search_names_its_field(
    stub: vectors_pb2_grpc.VectorsServiceStub, fields: dict[str, Any], path: str
) -> None:
    await create(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SearchPoints(parse(pb.SearchPointsRequest(), {"collection": "docs", **fields}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[2] == [path]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": "", "dimension": 3}, "collection.name"),
        ({"name": "../x", "dimension": 3}, "collection.name"),
        ({"name": "a"}, "collection.dimension"),
        ({"name": "a", "dimension": 65_537}, "collection.dimension"),
        ({"name": "a", "dimension": 3, "distance": 9}, "collection.distance"),
        (
            {"name": "a", "dimension": 3, "payloadIndexes": [{"field": "x"}]},
            "collection.payload_indexes[0].type",
        ),
        (
            {"name": "a", "dimension": 3, "payloadIndexes": [{"field": "", "type": 1}]},
            "collection.payload_indexes[0].field",
        ),
    ],
)
async def test_a_bad_collection_names_its_field(
    stub: vectors_pb2_grpc.VectorsServiceStub, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CreateCollection(parse(pb.CreateCollectionRequest(), {"collection": fields}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[2] == [path]


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [
        ("", grpc.StatusCode.FAILED_PRECONDITION, "NO_EMBEDDING_MODEL"),
        ("wide", grpc.StatusCode.FAILED_PRECONDITION, "EMBEDDING_DIMENSION"),
        ("unknown", grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ("away", grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    ],
)
async def test_text_that_cannot_be_embedded_says_why(
    stub: vectors_pb2_grpc.VectorsServiceStub, model: str, code: grpc.StatusCode, reason: str
) -> None:
    await create(stub, embedding_model=model)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SearchPoints(pb.SearchPointsRequest(collection="docs", text="a"))
    assert (caught.value.code(), details(caught.value)[0]) == (code, reason)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpsertPoints(
            pb.UpsertPointsRequest(collection="docs", points=[pb.Point(id="a", text="a")])
        )
    assert caught.value.code() is code


async def test_a_delete_without_or_with_two_selections_is_refused(
    stub: vectors_pb2_grpc.VectorsServiceStub,
) -> None:
    await create(stub)
    has_id = pb.Filter(must=[pb.Condition(has_id=pb.HasId(ids=["a"]))])
    for request in (
        pb.DeletePointsRequest(collection="docs"),
        pb.DeletePointsRequest(collection="docs", ids=["a"], filter=has_id),
        pb.DeletePointsRequest(collection="docs", filter=pb.Filter()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DeletePoints(request)
        assert details(caught.value)[2] == ["filter"]


@pytest.mark.timeout(600)  # thousands of requests
async def test_odd_requests_are_refused_with_a_reason(stub: vectors_pb2_grpc.VectorsServiceStub) -> None:
    upsert = {"collection": "docs", "points": [{"id": "p", "vector": {"values": [1, 2, 3]}}]}

    async def restore() -> None:
        with suppress(grpc.aio.AioRpcError):
            await create(stub, payload_indexes=[pb.PayloadIndex(field="kind", type=pb.PAYLOAD_TYPE_KEYWORD)])
        await stub.UpsertPoints(parse(pb.UpsertPointsRequest(), upsert))

    await restore()
    names = {"collection": "docs", "field": "kind", "id": "p"}
    bases = {
        "CreateCollection": {"collection": {"name": "new", "dimension": 3}},
        "UpsertPoints": upsert,
        "SearchPoints": {"collection": "docs", "vector": {"values": [1, 2, 3]}},
    }
    await hostile.probe(stub, pb.DESCRIPTOR.services_by_name["VectorsService"], names, bases, restore)
