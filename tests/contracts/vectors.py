"""What every VectorStore does."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Any

import pytest

from services.runtime.errors import AlreadyExistsError, NotFoundError
from services.vectors.domain import (
    CollectionSpec,
    Condition,
    Distance,
    Exists,
    Filter,
    HasId,
    Match,
    PayloadIndex,
    PayloadType,
    Point,
    Query,
    Range,
    Selection,
)

if TYPE_CHECKING:
    from services.vectors.domain import VectorStore

DOCS = CollectionSpec("docs", 2, payload_indexes=(PayloadIndex("document", PayloadType.KEYWORD),))


def point(number: int, vector: list[float] | None = None, **payload: Any) -> Point:
    return Point(f"p{number}", vector or [1.0, float(number)], {"n": number, **payload})


async def ids(store: VectorStore, matching: Filter) -> set[str]:
    page = await store.scan("docs", matching, Selection(payload=False), after=None, limit=100)
    assert page.next is None
    return {found.id for found in page.points}


class VectorStoreContract:
    """Subclasses give a fixture `store`: an empty one."""

    async def test_a_created_collection_is_read_back_as_given(self, store: VectorStore) -> None:
        made = await store.create_collection(DOCS)
        assert (made.spec, made.point_count) == (DOCS, 0)
        assert await store.collection("docs") == made
        assert await store.spec("docs") == DOCS

    async def test_creating_twice_fails_unless_it_is_the_same_request(self, store: VectorStore) -> None:
        made = await store.create_collection(DOCS, request_id="r1")
        assert await store.create_collection(DOCS, request_id="r1") == made
        for spec, request_id in ((DOCS, ""), (DOCS, "r2"), (CollectionSpec("docs", 3), "r1")):
            with pytest.raises(AlreadyExistsError):
                await store.create_collection(spec, request_id=request_id)

    async def test_collections_come_sorted_in_pages(self, store: VectorStore) -> None:
        for name in ("b", "a", "c"):
            await store.create_collection(CollectionSpec(name, 2))
        assert [found.spec.name for found in await store.collections(limit=2)] == ["a", "b"]
        assert [found.spec.name for found in await store.collections(after="b", limit=2)] == ["c"]

    async def test_a_deleted_collection_is_gone_and_its_name_is_free(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(1)])
        await store.delete_collection("docs")
        with pytest.raises(NotFoundError):
            await store.collection("docs")
        await store.create_collection(DOCS)
        assert await store.count("docs", Filter()) == 0

    async def test_every_call_on_an_unknown_collection_is_not_found(self, store: VectorStore) -> None:
        for call in (
            store.collection("none"),
            store.spec("none"),
            store.delete_collection("none"),
            store.upsert("none", [point(1)]),
            store.search("none", Query([1.0, 0.0])),
            store.points("none", ["p1"], Selection()),
            store.scan("none", Filter(), Selection(), after=None, limit=1),
            store.delete("none", ["p1"]),
            store.delete_matching("none", Filter()),
            store.count("none", Filter()),
        ):
            with pytest.raises(NotFoundError) as caught:
                await call
            assert caught.value.metadata == {"collection": "none"}

    async def test_a_point_is_read_back_with_its_id_and_payload(self, store: VectorStore) -> None:
        await store.create_collection(CollectionSpec("docs", 2, Distance.DOT))
        payload = {"text": "é\u0000", "n": 3, "half": 0.5, "yes": True, "none": None, "list": [1, {"a": []}]}
        given = Point("any/id ü", array("f", [0.5, 2.0]), payload)
        await store.upsert("docs", [given])
        (found,) = await store.points("docs", ["any/id ü", "other"], Selection(vector=True))
        assert (found.id, found.payload) == (given.id, payload)
        assert list(found.vector or ()) == [0.5, 2.0]

    async def test_upserting_an_id_again_replaces_it_whole(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(1, old=True), point(1, [0.0, 1.0], new=True)])
        assert await store.count("docs", Filter()) == 1
        (found,) = await store.points("docs", ["p1"], Selection(vector=True))
        assert found.payload == {"n": 1, "new": True}
        assert list(found.vector or ()) == [0.0, 1.0]

    async def test_points_come_in_the_order_asked(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(number) for number in range(5)])
        found = await store.points("docs", ["p4", "p0", "p9", "p2", "p0"], Selection())
        assert [entry.id for entry in found] == ["p4", "p0", "p2"]

    @pytest.mark.parametrize(
        ("distance", "order", "best"),
        [
            (Distance.COSINE, ["p1", "p2", "p3"], 1.0),
            (Distance.DOT, ["p2", "p1", "p3"], 20.0),
            (Distance.EUCLID, ["p1", "p3", "p2"], 1.0),
        ],
    )
    async def test_search_orders_by_the_collections_distance(
        self, store: VectorStore, distance: Distance, order: list[str], best: float
    ) -> None:
        await store.create_collection(CollectionSpec("docs", 2, distance))
        await store.upsert("docs", [point(1, [1.0, 0.0]), point(2, [10.0, 5.0]), point(3, [-1.0, 2.0])])
        found = await store.search("docs", Query([2.0, 0.0]))
        assert [hit.point.id for hit in found] == order
        assert found[0].score == pytest.approx(best)

    async def test_a_threshold_keeps_only_what_is_near_enough(self, store: VectorStore) -> None:
        for distance, threshold in ((Distance.COSINE, 0.9), (Distance.EUCLID, 1.5)):
            name = distance.value
            await store.create_collection(CollectionSpec(name, 2, distance))
            await store.upsert(name, [point(1, [1.0, 0.0]), point(2, [0.0, 1.0])])
            found = await store.search(name, Query([2.0, 0.0], score_threshold=threshold))
            assert [hit.point.id for hit in found] == ["p1"]

    async def test_limit_and_offset_cut_a_part_of_the_results(self, store: VectorStore) -> None:
        await store.create_collection(CollectionSpec("docs", 2, Distance.EUCLID))
        await store.upsert("docs", [point(number) for number in range(6)])
        found = await store.search("docs", Query([1.0, 0.0], limit=2, offset=3))
        assert [hit.point.id for hit in found] == ["p3", "p4"]

    async def test_selectors_choose_what_is_returned(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(1, author={"name": "Ada", "born": 1815})])
        for selection, payload, vector in (
            (Selection(), {"n": 1, "author": {"name": "Ada", "born": 1815}}, False),
            (Selection(payload=False), {}, False),
            (Selection(include=("author.name",), vector=True), {"author": {"name": "Ada"}}, True),
            (Selection(exclude=("author",)), {"n": 1}, False),
        ):
            (hit,) = await store.search("docs", Query([1.0, 1.0], selection=selection))
            (read,) = await store.points("docs", ["p1"], selection)
            page = await store.scan("docs", Filter(), selection, after=None, limit=1)
            for found in (hit.point, read, page.points[0]):
                assert (found.id, found.payload, found.vector is not None) == ("p1", payload, vector)

    @pytest.mark.parametrize(
        ("condition", "expected"),
        [
            (Match("document", ("a",)), {"p1", "p2"}),
            (Match("document", ("a", "b")), {"p1", "p2", "p3"}),
            (Match("n", (3,)), {"p3"}),
            (Match("half", (0.5, 1)), {"p1", "p2"}),
            (Match("flag", (True,)), {"p1"}),
            (Match("tags", ("y",)), {"p2", "p3"}),
            (Match("deep.er", ("v",)), {"p1"}),
            (Match('odd[]."a b"', (True,)), {"p2"}),
            (Match("flag", (False, True)), {"p1", "p2"}),
            (Match("flag", (1,)), set()),
            (Match("mixed", ("s", 7)), {"p1", "p2"}),
            (Range("n", gt=1, lte=3), {"p2", "p3"}),
            (Range("n", gte=2, lt=3), {"p2"}),
            (Exists("flag"), {"p1", "p2"}),
            (Exists("nothing"), set()),
            (HasId(("p1", "p3", "p9")), {"p1", "p3"}),
            (Filter(should=(Match("n", (1,)), Match("n", (2,)))), {"p1", "p2"}),
            (Filter(), {"p1", "p2", "p3"}),
        ],
    )
    async def test_conditions_match(
        self, store: VectorStore, condition: Condition, expected: set[str]
    ) -> None:
        await store.create_collection(DOCS)
        await store.upsert(
            "docs",
            [
                point(1, document="a", half=0.5, flag=True, tags=["x"], deep={"er": "v"}, mixed="s"),
                point(2, document="a", half=1, flag=False, tags=["x", "y"], mixed=7, odd=[{"a b": True}]),
                point(3, document="b", tags="y", nothing=None),
            ],
        )
        everything = {"p1", "p2", "p3"}
        assert await ids(store, Filter(must=(condition,))) == expected
        assert await ids(store, Filter(should=(condition,))) == expected
        assert await ids(store, Filter(must_not=(condition,))) == everything - expected
        assert await store.count("docs", Filter(must=(condition,))) == len(expected)
        found = await store.search("docs", Query([1.0, 1.0], filter=Filter(must=(condition,))))
        assert {hit.point.id for hit in found} == expected

    async def test_a_scan_gives_every_point_once_over_its_pages(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(number) for number in range(25)])
        seen: list[str] = []
        after: str | None = None
        for _ in range(3):
            page = await store.scan("docs", Filter(), Selection(), after=after, limit=10)
            seen += [found.id for found in page.points]
            after = page.next
        assert after is None
        assert sorted(seen) == sorted(f"p{number}" for number in range(25))

    async def test_deleting_counts_what_was_there(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        await store.upsert("docs", [point(number, document="ab"[number % 2]) for number in range(10)])
        assert await store.delete("docs", ["p0", "p1", "p77"]) == 2
        matching = Filter(must=(Match("document", ("a",)),))
        assert await store.delete_matching("docs", matching) == 4
        assert await store.delete_matching("docs", matching) == 0
        assert await ids(store, Filter()) == {"p3", "p5", "p7", "p9"}

    async def test_concurrent_writers_lose_nothing(self, store: VectorStore) -> None:
        await store.create_collection(DOCS)
        batches = [[point(base * 10 + number) for number in range(10)] for base in range(40)]
        await asyncio.gather(*(store.upsert("docs", batch) for batch in batches))
        assert await store.count("docs", Filter()) == 400
