"""Between search messages and the domain; every error names the field's path in the request."""

from __future__ import annotations

import html
from math import isfinite
from typing import TYPE_CHECKING, Any

from plexus.search.v1 import search_pb2
from services.runtime.bounds import check_count
from services.runtime.errors import InvalidArgumentError
from services.search.domain import (
    MAX_ALTERNATIVES,
    MAX_CONDITIONS,
    MAX_FACETS,
    MAX_FILTER_DEPTH,
    MAX_QUERY_LENGTH,
    Analyzer,
    Document,
    Exists,
    Facet,
    FacetOptions,
    Field,
    FieldType,
    Filter,
    HasId,
    Highlight,
    HighlightOptions,
    Hit,
    Index,
    Indexed,
    IndexSpec,
    Range,
    Sort,
    Term,
    Words,
    typed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf import struct_pb2

    from services.search.domain import Condition, Scalar

_EXACT_INTEGERS = 2**53
_TYPES = {
    search_pb2.FIELD_TYPE_TEXT: FieldType.TEXT,
    search_pb2.FIELD_TYPE_KEYWORD: FieldType.KEYWORD,
    search_pb2.FIELD_TYPE_INTEGER: FieldType.INTEGER,
    search_pb2.FIELD_TYPE_FLOAT: FieldType.FLOAT,
    search_pb2.FIELD_TYPE_BOOL: FieldType.BOOL,
    search_pb2.FIELD_TYPE_DATE: FieldType.DATE,
}
_TYPE_NUMBERS = {kind: number for number, kind in _TYPES.items()}
_ANALYZERS = {
    search_pb2.ANALYZER_UNSPECIFIED: Analyzer.DEFAULT,
    search_pb2.ANALYZER_DEFAULT: Analyzer.DEFAULT,
    search_pb2.ANALYZER_ENGLISH: Analyzer.ENGLISH,
}
_ANALYZER_NUMBERS = {analyzer: number for number, analyzer in _ANALYZERS.items() if number}
_EXACT = (FieldType.KEYWORD, FieldType.INTEGER, FieldType.FLOAT, FieldType.BOOL, FieldType.DATE)
_ORDERED = (FieldType.INTEGER, FieldType.FLOAT, FieldType.DATE)
_COUNTED = (FieldType.KEYWORD, FieldType.INTEGER, FieldType.BOOL)
_SEARCHED = (FieldType.TEXT, FieldType.KEYWORD)
_HIGHLIGHT_CHARS = (20, 2000)
_DEFAULT_HIGHLIGHT_CHARS = 150
_DEFAULT_FACET_LIMIT = 10
_MAX_FACET_LIMIT = 1000
_MAX_BOOST = 1000.0


def spec_from(message: search_pb2.Index) -> IndexSpec:
    """The domain's index.

    Raises:
        InvalidArgumentError: A field is malformed.
    """
    fields = []
    for number, entry in enumerate(message.fields):
        where = f"index.fields[{number}]"
        if entry.type not in _TYPES:
            raise InvalidArgumentError("must be one of the known types", field=f"{where}.type")
        kind = _TYPES[entry.type]
        if entry.analyzer and kind is not FieldType.TEXT:
            raise InvalidArgumentError("is for text only", field=f"{where}.analyzer")
        if entry.analyzer == search_pb2.ANALYZER_KEYWORD:
            fields.append(Field(entry.name, FieldType.KEYWORD))
        elif entry.analyzer in _ANALYZERS:
            fields.append(Field(entry.name, kind, _ANALYZERS[entry.analyzer]))
        else:
            raise InvalidArgumentError("must be one of the known analysers", field=f"{where}.analyzer")
    return IndexSpec(message.name, tuple(fields))


def index_to(index: Index) -> search_pb2.Index:
    """The proto's index."""
    message = search_pb2.Index(
        name=index.spec.name,
        fields=[
            search_pb2.Field(
                name=entry.name,
                type=_TYPE_NUMBERS[entry.type],
                analyzer=_ANALYZER_NUMBERS[entry.analyzer]
                if entry.type is FieldType.TEXT
                else search_pb2.ANALYZER_UNSPECIFIED,
            )
            for entry in index.spec.fields
        ],
        document_count=index.document_count,
    )
    message.create_time.FromDatetime(index.created_at)
    return message


def documents_from(messages: Sequence[search_pb2.Document]) -> list[Document]:
    """The domain's documents; each is checked when it is indexed."""
    return [
        Document(message.id, {key: _value_from(value) for key, value in message.fields.fields.items()})
        for message in messages
    ]


def _value_from(value: Any) -> Any:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            number: float = value.number_value
            # Whole numbers were integers before JSON.
            whole = isfinite(number) and number.is_integer() and abs(number) < _EXACT_INTEGERS
            return int(number) if whole else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _value_from(entry) for key, entry in value.struct_value.fields.items()}
        case "list_value":
            return [_value_from(entry) for entry in value.list_value.values]
        case _:
            return None


def document_to(document: Document, *, with_fields: bool = True) -> search_pb2.Document:
    """The proto's document."""
    message = search_pb2.Document(id=document.id)
    if with_fields:
        message.fields.SetInParent()
        message.fields.update(document.fields)
    return message


def errors_to(indexed: Indexed) -> list[search_pb2.DocumentError]:
    """The proto's errors of a batch."""
    return [
        search_pb2.DocumentError(
            position=error.position, id=error.id, field=error.field, message=error.message
        )
        for error in indexed.errors
    ]


def words_from(request: search_pb2.SearchRequest, spec: IndexSpec) -> Words | None:
    """What to find; None for everything.

    Raises:
        InvalidArgumentError: It is too long, or a field cannot be searched.
    """
    fields = tuple(_boosted(said, spec, f"fields[{number}]") for number, said in enumerate(request.fields))
    which = request.WhichOneof("words")
    if which is None:
        return None
    said = request.query if which == "query" else request.text
    return words_of(said, which, fields=fields, require_all=request.require_all)


def words_of(
    said: str, where: str, *, fields: tuple[tuple[str, float], ...] = (), require_all: bool = False
) -> Words:
    """Words from the field `query` or `text`.

    Raises:
        InvalidArgumentError: They are blank or too long.
    """
    if len(said) > MAX_QUERY_LENGTH:
        raise InvalidArgumentError(f"at most {MAX_QUERY_LENGTH} characters", field=where)
    if where == "query" and not said.strip():
        raise InvalidArgumentError(
            "is blank (at position 0)", field=where, reason="INVALID_QUERY", metadata={"position": "0"}
        )
    return Words(said, plain=where == "text", fields=fields, require_all=require_all)


def _boosted(said: str, spec: IndexSpec, where: str) -> tuple[str, float]:
    name, _, factor = said.partition("^")
    _check_type(spec, name, _SEARCHED, where)
    try:
        boost = float(factor) if factor else 1.0
    except ValueError as error:
        raise InvalidArgumentError("the boost must be a number", field=where) from error
    if not 0 < boost <= _MAX_BOOST:
        raise InvalidArgumentError(f"the boost must be above 0 and at most {_MAX_BOOST:.0f}", field=where)
    return name, boost


def _check_type(spec: IndexSpec, name: str, kinds: tuple[FieldType, ...], where: str) -> Field:
    entry = spec.field(name, where)
    if entry.type not in kinds:
        wanted = ", ".join(kinds)
        raise InvalidArgumentError(
            f"field {name} is of type {entry.type}; this takes {wanted}",
            field=where,
            reason="WRONG_FIELD_TYPE",
        )
    return entry


def filter_from(message: search_pb2.Filter, spec: IndexSpec) -> Filter:
    """The domain's filter.

    Raises:
        InvalidArgumentError: A condition is malformed, or there are too many or too deep.
    """
    return _filter_from(message, spec, "filter", [MAX_CONDITIONS], MAX_FILTER_DEPTH)


def _filter_from(
    message: search_pb2.Filter, spec: IndexSpec, where: str, budget: list[int], depth: int
) -> Filter:
    if depth == 0:
        raise InvalidArgumentError(f"nests deeper than {MAX_FILTER_DEPTH}", field=where)
    parts: dict[str, tuple[Condition, ...]] = {}
    for name in ("must", "should", "must_not"):
        conditions = getattr(message, name)
        budget[0] -= len(conditions)
        if budget[0] < 0:
            raise InvalidArgumentError(f"has more than {MAX_CONDITIONS} conditions", field="filter")
        parts[name] = tuple(
            _condition_from(condition, spec, f"{where}.{name}[{number}]", budget, depth)
            for number, condition in enumerate(conditions)
        )
    return Filter(**parts)


def _condition_from(
    message: search_pb2.Condition, spec: IndexSpec, where: str, budget: list[int], depth: int
) -> Condition:
    match message.WhichOneof("condition"):
        case "term":
            return _term_from(message.term, spec, f"{where}.term")
        case "range":
            return _range_from(message.range, spec, f"{where}.range")
        case "exists":
            _check_type(spec, message.exists.field, _EXACT, f"{where}.exists.field")
            return Exists(message.exists.field)
        case "has_id":
            check_count(len(message.has_id.ids), MAX_ALTERNATIVES, f"{where}.has_id.ids")
            return HasId(tuple(message.has_id.ids))
        case "filter":
            return _filter_from(message.filter, spec, f"{where}.filter", budget, depth - 1)
        case _:
            raise InvalidArgumentError("has no condition", field=where)


def _term_from(message: search_pb2.Term, spec: IndexSpec, where: str) -> Term:
    entry = _check_type(spec, message.field, _EXACT, f"{where}.field")
    check_count(len(message.any_of), MAX_ALTERNATIVES, f"{where}.any_of")
    values = [_typed(entry, value, f"{where}.any_of[{n}]") for n, value in enumerate(message.any_of)]
    if message.HasField("value"):
        values.append(_typed(entry, message.value, f"{where}.value"))
    if not values:
        raise InvalidArgumentError("must have a value", field=f"{where}.value")
    return Term(message.field, tuple(values))


def _range_from(message: search_pb2.Range, spec: IndexSpec, where: str) -> Range:
    entry = _check_type(spec, message.field, _ORDERED, f"{where}.field")
    for one, other in (("gt", "gte"), ("lt", "lte")):
        if message.HasField(one) and message.HasField(other):  # type: ignore[arg-type]  # names above
            raise InvalidArgumentError(f"not together with {other}", field=f"{where}.{one}")

    def bound(*names: str) -> Scalar | None:
        for name in names:
            if message.HasField(name):  # type: ignore[arg-type]  # names below
                return _typed(entry, getattr(message, name), f"{where}.{name}")
        return None

    lower, upper = bound("gt", "gte"), bound("lt", "lte")
    if lower is None and upper is None:
        raise InvalidArgumentError("must have a bound", field=where)
    return Range(
        message.field,
        lower,
        upper,
        include_lower=not message.HasField("gt"),
        include_upper=not message.HasField("lt"),
    )


def _typed(entry: Field, value: struct_pb2.Value, where: str) -> Scalar:
    try:
        return typed(entry, _value_from(value))
    except ValueError as error:
        raise InvalidArgumentError(str(error), field=where) from error


def sort_from(message: search_pb2.Sort, spec: IndexSpec) -> Sort:
    """The domain's order.

    Raises:
        InvalidArgumentError: The field cannot be sorted by.
    """
    _check_type(spec, message.field, _EXACT, "sort.field")
    return Sort(message.field, descending=message.descending)


def highlight_from(message: search_pb2.HighlightOptions, spec: IndexSpec) -> HighlightOptions:
    """The domain's highlight options.

    Raises:
        InvalidArgumentError: A field is not text, or the length is out of bounds.
    """
    for number, name in enumerate(message.fields):
        _check_type(spec, name, (FieldType.TEXT,), f"highlight.fields[{number}]")
    chars = message.max_chars or _DEFAULT_HIGHLIGHT_CHARS
    low, high = _HIGHLIGHT_CHARS
    if not low <= chars <= high:
        raise InvalidArgumentError(f"must be {low} to {high}", field="highlight.max_chars")
    return HighlightOptions(tuple(dict.fromkeys(message.fields)), chars)


def facets_from(messages: Sequence[search_pb2.FacetOptions], spec: IndexSpec) -> tuple[FacetOptions, ...]:
    """The domain's facet options.

    Raises:
        InvalidArgumentError: There are too many, or a field cannot be counted by.
    """
    if len(messages) > MAX_FACETS:
        raise InvalidArgumentError(f"at most {MAX_FACETS}", field="facets")
    facets = []
    for number, message in enumerate(messages):
        _check_type(spec, message.field, _COUNTED, f"facets[{number}].field")
        limit = message.limit or _DEFAULT_FACET_LIMIT
        if not 1 <= limit <= _MAX_FACET_LIMIT:
            raise InvalidArgumentError(f"must be 1 to {_MAX_FACET_LIMIT}", field=f"facets[{number}].limit")
        facets.append(FacetOptions(message.field, limit))
    return tuple(facets)


def hit_to(hit: Hit, *, with_fields: bool) -> search_pb2.Hit:
    """The proto's hit."""
    return search_pb2.Hit(
        document=document_to(hit.document, with_fields=with_fields),
        score=hit.score,
        highlights=map(_highlight_to, hit.highlights),
    )


def _highlight_to(highlight: Highlight) -> search_pb2.Highlight:
    text, marked, end = highlight.text, [], 0
    for start, stop in highlight.spans:
        marked += [html.escape(text[end:start]), "<mark>", html.escape(text[start:stop]), "</mark>"]
        end = stop
    marked.append(html.escape(text[end:]))
    return search_pb2.Highlight(
        field=highlight.field,
        text=text,
        spans=[search_pb2.Span(start=start, end=stop) for start, stop in highlight.spans],
        html="".join(marked),
    )


def facet_to(facet: Facet) -> search_pb2.Facet:
    """The proto's facet."""
    return search_pb2.Facet(
        field=facet.field,
        values=[search_pb2.FacetValue(value=value, count=count) for value, count in facet.values],
        other_count=facet.other_count,
    )
