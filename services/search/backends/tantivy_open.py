"""One open Tantivy index: its schema, its writer while there is one, and reads."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import tantivy as engine

from services.runtime.errors import NotFoundError
from services.search.backends import tantivy_query
from services.search.backends.tantivy_query import ID_FIELD
from services.search.domain import (
    Analyzer,
    Document,
    Facet,
    FieldType,
    Highlight,
    Hit,
    IndexSpec,
    Query,
    Results,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.search.backends.tantivy_files import Stored
    from services.search.domain import Field, Scalar

SOURCE_FIELD = "_source"
_TOKENIZERS = {Analyzer.DEFAULT: "default", Analyzer.ENGLISH: "en_stem"}
WRITER_THREADS = 1
_TRUTH = {0: "false", 1: "true"}

Row = tuple[str, bytes, "list[tuple[Field, Scalar]]"]
"""A document ready for the engine: id, JSON, typed values."""


def schema_of(spec: IndexSpec) -> Any:
    """The engine's schema of an index."""
    builder = engine.SchemaBuilder()
    builder.add_text_field(ID_FIELD, stored=True, fast=True, tokenizer_name="raw", index_option="basic")
    builder.add_bytes_field(SOURCE_FIELD, stored=True)
    for entry in spec.fields:
        match entry.type:
            case FieldType.TEXT:
                builder.add_text_field(entry.name, tokenizer_name=_TOKENIZERS[entry.analyzer])
            case FieldType.KEYWORD:
                builder.add_text_field(entry.name, fast=True, tokenizer_name="raw", index_option="basic")
            case FieldType.INTEGER:
                builder.add_integer_field(entry.name, indexed=True, fast=True)
            case FieldType.FLOAT:
                builder.add_float_field(entry.name, indexed=True, fast=True)
            case FieldType.BOOL:
                builder.add_boolean_field(entry.name, indexed=True, fast=True)
            case FieldType.DATE:
                builder.add_date_field(entry.name, indexed=True, fast=True)
    return builder.build()


def create_files(folder: Path, spec: IndexSpec) -> None:
    """Write an empty index into a folder."""
    engine.Index(schema_of(spec), path=str(folder))


class OpenIndex:
    """An index in use. Everything that writes is called from one thread; reads from any."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.spec = stored.spec
        self.deleted = False
        self.used_at = 0.0
        self._index = engine.Index.open(str(stored.data_folder))
        self._index.config_reader("manual")
        self._writer: Any = None
        self._pending = False

    # --- writes

    def open_writer(self, heap_bytes: int) -> None:
        """Make the writer if there is none."""
        self.used_at = time.monotonic()
        if self._writer is None:
            self._writer = self._index.writer(heap_bytes, WRITER_THREADS)

    def close_writer(self) -> None:
        """Give the writer's memory back."""
        self._writer = None

    @property
    def has_writer(self) -> bool:
        """Whether the writer exists."""
        return self._writer is not None

    def add(self, rows: Sequence[Row]) -> None:
        """Add documents, replacing those of the same ids; `commit` makes it durable."""
        self._pending = True
        for identifier, source, values in rows:
            document = engine.Document()
            document.add_text(ID_FIELD, identifier)
            document.add_bytes(SOURCE_FIELD, source)
            for entry, value in values:
                _add_value(document, entry, value)
            self._writer.delete_documents_by_term(ID_FIELD, identifier)
            self._writer.add_document(document)

    def delete(self, query: Query) -> int:
        """Delete what a query matches; `commit` makes it durable."""
        self.commit()  # what is not committed can neither be counted nor found
        matching, _ = tantivy_query.query_to(self._index, self.spec, query.words, query.filter)
        found: Any = self._index.searcher().search(matching, 1, count=True)
        count: int = found.count  # absent from the stubs
        if count:
            self._pending = True
            self._writer.delete_documents_by_query(matching)
        return count

    def commit(self) -> None:
        """Make what was written durable and visible; on failure it is as if it had never been written."""
        if not self._pending:
            return
        try:
            self._writer.commit()
        except BaseException:
            # The next write starts from the last commit.
            self._writer = None
            raise
        finally:
            self._pending = False
        self._index.reload()

    def forget(self) -> None:
        """Drop what was written since the last commit."""
        self._writer = None
        self._pending = False

    # --- reads

    def count(self) -> int:
        """Documents in the index."""
        count: int = self._index.searcher().num_docs
        return count

    def document(self, identifier: str) -> Document:
        """One document by id."""
        searcher = self._index.searcher()
        query = engine.Query.term_query(self._index.schema, ID_FIELD, identifier)
        hits = searcher.search(query, 1, count=False).hits
        if not hits:
            raise NotFoundError(
                f"index {self.spec.name} has no document {identifier[:128]!r}",
                reason="DOCUMENT_NOT_FOUND",
                metadata={"index": self.spec.name, "document": identifier[:256]},
            )
        return _document(searcher.doc(hits[0][1]))

    def search(self, query: Query) -> Results:
        """Find documents."""
        matching, scored = tantivy_query.query_to(self._index, self.spec, query.words, query.filter)
        searcher = self._index.searcher()
        order: dict[str, Any] = {}
        if query.sort is not None:
            order["order_by_field"] = query.sort.field
            order["order"] = engine.Order.Desc if query.sort.descending else engine.Order.Asc
        found: Any = searcher.search(matching, query.limit, offset=query.offset, count=True, **order)
        generators = self._generators(searcher, scored, query)
        hits = []
        for score, address in found.hits:
            document = _document(searcher.doc(address))
            highlights = _highlights(document, generators)
            hits.append(Hit(document, 0.0 if query.sort else score, highlights))
        return Results(hits, found.count, self._facets(searcher, matching, query))

    def _generators(self, searcher: Any, scored: Any, query: Query) -> list[tuple[str, Any]]:
        if query.highlight is None or scored is None:
            return []
        texts = [entry.name for entry in self.spec.fields if entry.type is FieldType.TEXT]
        generators = []
        for name in query.highlight.fields or texts:
            generator = engine.SnippetGenerator.create(searcher, scored, self._index.schema, name)
            generator.set_max_num_chars(query.highlight.max_chars)
            generators.append((name, generator))
        return generators

    def _facets(self, searcher: Any, matching: Any, query: Query) -> tuple[Facet, ...]:
        if not query.facets:
            return ()
        wanted = {
            str(number): {"terms": {"field": facet.field, "size": facet.limit}}
            for number, facet in enumerate(query.facets)
        }
        counted = searcher.aggregate(matching, wanted)
        facets = []
        for number, facet in enumerate(query.facets):
            found = counted[str(number)]
            is_bool = self.spec.field(facet.field, "facets").type is FieldType.BOOL
            values = tuple(
                (
                    _TRUTH[int(bucket["key"])] if is_bool else _facet_value(bucket["key"]),
                    int(bucket["doc_count"]),
                )
                for bucket in found["buckets"]
            )
            facets.append(Facet(facet.field, values, int(found["sum_other_doc_count"])))
        return tuple(facets)


def _facet_value(key: Any) -> str:
    return str(int(key)) if isinstance(key, float) and key.is_integer() else str(key)


def _add_value(document: Any, entry: Field, value: Any) -> None:
    match entry.type:
        case FieldType.TEXT | FieldType.KEYWORD:
            document.add_text(entry.name, value)
        case FieldType.INTEGER:
            document.add_integer(entry.name, value)
        case FieldType.FLOAT:
            document.add_float(entry.name, value)
        case FieldType.BOOL:
            document.add_boolean(entry.name, value)
        case FieldType.DATE:
            document.add_date(entry.name, value)


def _document(found: Any) -> Document:
    return Document(found.get_first(ID_FIELD), json.loads(bytes(found.get_first(SOURCE_FIELD))))


def _highlights(document: Document, generators: list[tuple[str, Any]]) -> tuple[Highlight, ...]:
    """The best fragment of each field; the engine counts in bytes of UTF-8, the domain in characters."""
    highlights = []
    for name, generator in generators:
        given = document.fields.get(name)
        texts = given if isinstance(given, list) else [given]
        only = engine.Document()
        for text in texts:
            if isinstance(text, str):
                only.add_text(name, text)
        snippet = generator.snippet_from_doc(only)
        spans = snippet.highlighted()
        if not spans:
            continue
        text = snippet.fragment()
        raw = text.encode()
        marks = tuple((len(raw[: s.start].decode()), len(raw[: s.end].decode())) for s in spans)
        highlights.append(Highlight(name, text, marks))
    return tuple(highlights)
