"""What every SearchIndex does."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from services.runtime.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from services.search.domain import (
    Analyzer,
    Condition,
    Document,
    Exists,
    FacetOptions,
    Field,
    FieldType,
    Filter,
    HasId,
    HighlightOptions,
    IndexSpec,
    Query,
    Range,
    Sort,
    Term,
    Words,
)

if TYPE_CHECKING:
    from services.search.domain import SearchIndex

PAGES = IndexSpec(
    "pages",
    (
        Field("title", FieldType.TEXT, Analyzer.ENGLISH),
        Field("body", FieldType.TEXT),
        Field("document", FieldType.KEYWORD),
        Field("size", FieldType.INTEGER),
        Field("rank", FieldType.FLOAT),
        Field("draft", FieldType.BOOL),
        Field("at", FieldType.DATE),
    ),
)


def page(number: int, **fields: Any) -> Document:
    return Document(f"d{number}", {"size": number, **fields})


async def found(index: SearchIndex, said: str | None = None, **query: Any) -> list[str]:
    words = None if said is None else Words(said)
    results = await index.search("pages", Query(words, **query))
    return [hit.document.id for hit in results.hits]


class SearchIndexContract:
    """Subclasses give a fixture `index`: an empty one."""

    async def test_a_created_index_is_read_back_as_given(self, index: SearchIndex) -> None:
        made = await index.create_index(PAGES)
        assert (made.spec, made.document_count) == (PAGES, 0)
        assert await index.index("pages") == made
        assert await index.spec("pages") == PAGES

    async def test_creating_twice_fails_unless_it_is_the_same_request(self, index: SearchIndex) -> None:
        made = await index.create_index(PAGES, request_id="r1")
        assert await index.create_index(PAGES, request_id="r1") == made
        other = IndexSpec("pages", PAGES.fields[:1])
        for spec, request_id in ((PAGES, ""), (PAGES, "r2"), (other, "r1")):
            with pytest.raises(AlreadyExistsError):
                await index.create_index(spec, request_id=request_id)

    async def test_indexes_come_sorted_in_pages(self, index: SearchIndex) -> None:
        for name in ("b", "a", "c"):
            await index.create_index(IndexSpec(name, PAGES.fields))
        assert [entry.spec.name for entry in await index.indexes(limit=2)] == ["a", "b"]
        assert [entry.spec.name for entry in await index.indexes(after="b", limit=2)] == ["c"]

    async def test_a_deleted_index_is_gone_and_its_name_is_free(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add("pages", [page(1)])
        await index.delete_index("pages")
        with pytest.raises(NotFoundError):
            await index.index("pages")
        await index.create_index(PAGES)
        assert await found(index) == []

    async def test_every_call_on_an_unknown_index_is_not_found(self, index: SearchIndex) -> None:
        for call in (
            index.index("none"),
            index.spec("none"),
            index.delete_index("none"),
            index.add("none", [page(1)]),
            index.document("none", "d1"),
            index.delete("none", Query()),
            index.search("none", Query()),
        ):
            with pytest.raises(NotFoundError) as caught:
                await call
            assert caught.value.metadata == {"index": "none"}

    async def test_a_document_is_read_back_as_given(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        fields = {"title": "é\u0000", "size": 3, "extra": {"a": [1, None, 0.5]}, "draft": None, "rank": 1}
        result = await index.add("pages", [Document("any/id ü", fields)])
        assert (result.indexed_count, result.errors) == (1, ())
        assert await index.document("pages", "any/id ü") == Document("any/id ü", fields)
        with pytest.raises(NotFoundError):
            await index.document("pages", "other")

    async def test_indexing_an_id_again_replaces_it_whole(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add("pages", [page(1, body="old"), page(1, body="newer")])
        await index.add("pages", [page(1, body="newest")])
        assert (await index.index("pages")).document_count == 1
        assert [await found(index, word) for word in ("old", "newer", "newest")] == [[], [], ["d1"]]

    async def test_each_document_of_a_batch_fails_by_itself(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        batch = [
            page(0, title=3),
            page(1),
            page(2, at="yesterday"),
            page(3, at="2024-01-01T00:00:00"),
            page(4, draft="no"),
            Document("d5", {"size": 1.5}),
            Document("", {}),
            page(7, document="x" * 9000),
            page(8, extra=float("nan")),
            page(9, at="1500-01-01T00:00:00Z"),
            page(10, body="x" * 2_000_000),
            page(11),
        ]
        result = await index.add("pages", batch)
        assert result.indexed_count == 2
        assert sorted(await found(index)) == ["d1", "d11"]
        fields = {error.position: error.field for error in result.errors}
        assert fields == {
            0: "documents[0].fields.title",
            2: "documents[2].fields.at",
            3: "documents[3].fields.at",
            4: "documents[4].fields.draft",
            5: "documents[5].fields.size",
            6: "documents[6].id",
            7: "documents[7].fields.document",
            8: "documents[8].fields",
            9: "documents[9].fields.at",
            10: "documents[10].fields",
        }

    async def test_a_rarer_word_ranks_higher(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add("pages", [page(1, body="cat dog"), page(2, body="dog"), page(3, body="dog cow")])
        results = await index.search("pages", Query(Words("dog cat")))
        assert results.hits[0].document.id == "d1"
        assert results.total_count == 3
        scores = [hit.score for hit in results.hits]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > scores[1] > 0

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("run", ["d1"]),
            ("title:runs", ["d1"]),
            ("body:run", []),
            ("quick AND fox", ["d1"]),
            ("quick -fox", ["d2"]),
            ('"quick brown"', ["d1"]),
            ('"brown quick"', ["d2"]),
            ("document:a", ["d1", "d2"]),
            ("size:>1", ["d2", "d3"]),
            ("size:[1 TO 3}", ["d1", "d2"]),
            ("draft:true", ["d1"]),
            ("at:[2024-01-01T00:00:00Z TO 2024-06-01T00:00:00Z]", ["d1"]),
            ("*", ["d1", "d2", "d3"]),
            ("(quick OR cow) AND NOT document:a", ["d3"]),
        ],
    )
    async def test_query_strings(self, index: SearchIndex, said: str, expected: list[str]) -> None:
        await self._three_pages(index)
        assert sorted(await found(index, said)) == expected

    @pytest.mark.parametrize(
        ("said", "position"),
        [
            ("(quick", 6),
            ("quick AND", 9),
            ("no:quick", 0),
            ("a no_such:quick", 2),
            ('title:"quick', 12),
            ("it's", 4),
            ("size:abc", 0),
            ("size:99999999999999999999", 0),
            ("ü (", 3),
            ("-quick", 0),
            ("(" * 5000 + "a" + ")" * 5000, 32),
            ("a " * 2000, 0),
        ],
    )
    async def test_an_unreadable_query_names_its_position(
        self, index: SearchIndex, said: str, position: int
    ) -> None:
        await self._three_pages(index)
        with pytest.raises(InvalidArgumentError) as caught:
            await found(index, said)
        assert caught.value.reason == "INVALID_QUERY"
        assert caught.value.metadata == {"position": str(position)}

    @pytest.mark.parametrize(
        "said", ["it's (quick", 'no:"quick', "quick AND", "¿QUICK?", "(" * 5000 + "quick"]
    )
    async def test_plain_words_are_never_an_error(self, index: SearchIndex, said: str) -> None:
        await self._three_pages(index)
        results = await index.search("pages", Query(Words(said, plain=True)))
        assert {hit.document.id for hit in results.hits} == {"d1", "d2"}
        nothing = await index.search("pages", Query(Words("?!", plain=True)))
        assert nothing.hits == []

    async def test_fields_boosts_and_all_words(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add("pages", [page(1, title="ant", body="bee"), page(2, title="bee", body="ant")])
        for boosted, first in (("title", "d1"), ("body", "d2")):
            fields = tuple((name, 9.0 if name == boosted else 1.0) for name in ("title", "body"))
            results = await index.search("pages", Query(Words("ant", fields=fields)))
            assert results.hits[0].document.id == first
        only_title = Words("ant", fields=(("title", 1.0),))
        assert (await index.search("pages", Query(only_title))).total_count == 1
        for require_all, count in ((False, 2), (True, 0)):
            words = Words("ant cow", require_all=require_all)
            assert (await index.search("pages", Query(words))).total_count == count

    @pytest.mark.parametrize(
        ("condition", "expected"),
        [
            (Term("document", ("a",)), {"d1", "d2"}),
            (Term("document", ("a", "b")), {"d1", "d2", "d3"}),
            (Term("size", (2,)), {"d2"}),
            (Term("rank", (0.5,)), {"d1"}),
            (Term("draft", (True,)), {"d1"}),
            (Term("at", (datetime(2024, 2, 1, tzinfo=UTC),)), {"d1"}),
            (Range("size", 1, 3, include_lower=False, include_upper=False), {"d2"}),
            (Range("size", 2), {"d2", "d3"}),
            (Range("rank", None, 1.0), {"d1", "d2"}),
            (Range("at", datetime(2024, 2, 1, tzinfo=UTC), include_lower=False), {"d2"}),
            (Exists("draft"), {"d1", "d2"}),
            (HasId(("d1", "d3", "d9")), {"d1", "d3"}),
            (Filter(should=(Term("size", (1,)), Term("size", (2,)))), {"d1", "d2"}),
            (Filter(), {"d1", "d2", "d3"}),
        ],
    )
    async def test_conditions_match_and_do_not_change_scores(
        self, index: SearchIndex, condition: Condition, expected: set[str]
    ) -> None:
        await self._three_pages(index)
        everything = {"d1", "d2", "d3"}
        assert set(await found(index, filter=Filter(must=(condition,)))) == expected
        assert set(await found(index, filter=Filter(should=(condition,)))) == expected
        assert set(await found(index, filter=Filter(must_not=(condition,)))) == everything - expected
        free = await index.search("pages", Query(Words("quick cow")))
        bound = await index.search("pages", Query(Words("quick cow"), Filter(must=(condition,))))
        scores = {hit.document.id: hit.score for hit in free.hits}
        assert {hit.document.id: hit.score for hit in bound.hits} == {
            name: pytest.approx(score) for name, score in scores.items() if name in expected
        }

    async def test_results_sort_by_a_field_with_the_missing_last(self, index: SearchIndex) -> None:
        await self._three_pages(index)
        assert await found(index, sort=Sort("rank", descending=True)) == ["d2", "d1", "d3"]
        assert await found(index, sort=Sort("rank")) == ["d1", "d2", "d3"]
        assert await found(index, sort=Sort("at", descending=True)) == ["d2", "d1", "d3"]
        assert await found(index, sort=Sort("document"), filter=Filter(must=(Range("size", 2),))) == [
            "d2",
            "d3",
        ]

    async def test_limit_and_offset_cut_a_part_and_the_total_stays(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add("pages", [page(number) for number in range(10)])
        results = await index.search("pages", Query(sort=Sort("size"), limit=3, offset=8))
        assert [hit.document.id for hit in results.hits] == ["d8", "d9"]
        assert results.total_count == 10

    async def test_highlights_mark_the_words_in_characters(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add(
            "pages", [page(1, title="Über runs", body="no match here"), page(2, body="ü Fox ran")]
        )
        query = Query(Words("running fox"), highlight=HighlightOptions())
        hits = {hit.document.id: hit.highlights for hit in (await index.search("pages", query)).hits}
        (title,) = hits["d1"]
        assert (title.field, title.text) == ("title", "Über runs")
        assert [title.text[start:end] for start, end in title.spans] == ["runs"]
        (body,) = hits["d2"]
        assert [body.text[start:end] for start, end in body.spans] == ["Fox"]
        only_body = Query(Words("running fox"), highlight=HighlightOptions(fields=("body",)))
        assert {
            hit.document.id: len(hit.highlights) for hit in (await index.search("pages", only_body)).hits
        } == {"d1": 0, "d2": 1}

    async def test_facets_count_all_matches(self, index: SearchIndex) -> None:
        await self._three_pages(index)
        query = Query(
            limit=1, facets=(FacetOptions("document", 1), FacetOptions("draft"), FacetOptions("size"))
        )
        document, draft, size = (await index.search("pages", query)).facets
        assert (document.values, document.other_count) == ((("a", 2),), 1)
        assert set(draft.values) == {("true", 1), ("false", 1)}
        assert set(size.values) == {("1", 1), ("2", 1), ("3", 1)}

    async def test_deleting_counts_what_was_there(self, index: SearchIndex) -> None:
        await self._three_pages(index)
        by_id = Query(filter=Filter(must=(HasId(("d1", "d77")),)))
        assert await index.delete("pages", by_id) == 1
        assert await index.delete("pages", Query(filter=Filter(must=(Term("document", ("a",)),)))) == 1
        assert await index.delete("pages", by_id) == 0
        assert await found(index) == ["d3"]
        assert await index.delete("pages", Query(Words("cow"))) == 1
        assert (await index.index("pages")).document_count == 0

    async def test_concurrent_writers_lose_nothing(self, index: SearchIndex) -> None:
        await index.create_index(PAGES)
        batches = [[page(base * 10 + number) for number in range(10)] for base in range(40)]
        deletion = index.delete("pages", Query(filter=Filter(must=(Range("size", 390),))))
        await asyncio.gather(*(index.add("pages", batch) for batch in batches))
        assert (await index.index("pages")).document_count == 400
        assert await deletion == 10

    @staticmethod
    async def _three_pages(index: SearchIndex) -> None:
        await index.create_index(PAGES)
        await index.add(
            "pages",
            [
                page(
                    1,
                    title="Running",
                    body="the quick brown fox",
                    document="a",
                    rank=0.5,
                    draft=True,
                    at="2024-02-01T01:00:00+01:00",
                ),
                page(2, body="brown quick", document="a", rank=1, draft=False, at="2025-01-01T00:00:00Z"),
                page(3, body="cow", document="b"),
            ],
        )
