"""Search: indexes of JSON documents, queries, and what every search engine does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

Scalar: TypeAlias = "str | int | float | bool | datetime"
"""A value of a field as the index sees it."""

MAX_FIELDS = 128
MAX_ID_BYTES = 256
MAX_KEYWORD_BYTES = 8000
MAX_QUERY_LENGTH = 8192
MAX_CONDITIONS = 256
MAX_FILTER_DEPTH = 8
MAX_ALTERNATIVES = 1000
MAX_FACETS = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,127}")
_INT64 = 2**63
_FIRST_YEAR, _LAST_YEAR = 1678, 2261
"""Years that 64 bits of nanoseconds hold whole."""


class FieldType(StrEnum):
    """Type of a field's values."""

    TEXT = "text"
    KEYWORD = "keyword"
    INTEGER = "integer"
    FLOAT = "float"
    BOOL = "bool"
    DATE = "date"


class Analyzer(StrEnum):
    """How text is cut into words."""

    DEFAULT = "default"
    ENGLISH = "english"


@dataclass(frozen=True, slots=True)
class Field:
    """A field that can be searched; the analyser counts for text only."""

    name: str
    type: FieldType
    analyzer: Analyzer = Analyzer.DEFAULT


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """What a caller says of an index; checked when made."""

    name: str
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgumentError(
                "must be 1 to 128 letters, digits, _ - . with a letter or digit first", field="index.name"
            )
        if not 1 <= len(self.fields) <= MAX_FIELDS:
            raise InvalidArgumentError(f"must be 1 to {MAX_FIELDS} fields", field="index.fields")
        seen = set()
        for number, entry in enumerate(self.fields):
            where = f"index.fields[{number}].name"
            if not _FIELD.fullmatch(entry.name):
                raise InvalidArgumentError(
                    "must be 1 to 128 letters, digits, _ - with a letter first", field=where
                )
            if entry.name in seen:
                raise InvalidArgumentError("is there twice", field=where)
            seen.add(entry.name)

    def field(self, name: str, where: str) -> Field:
        """A field by name.

        Raises:
            InvalidArgumentError: There is none; names `where` the caller said it.
        """
        for entry in self.fields:
            if entry.name == name:
                return entry
        raise InvalidArgumentError(
            f"index {self.name} has no field {name[:128]!r}", field=where, reason="UNKNOWN_FIELD"
        )


@dataclass(frozen=True, slots=True)
class Index:
    """An index as it is."""

    spec: IndexSpec
    created_at: datetime
    document_count: int


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON object with an id."""

    id: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DocumentError:
    """A document of a batch that was refused."""

    position: int
    id: str
    field: str
    message: str


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of a batch."""

    indexed_count: int
    errors: tuple[DocumentError, ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """A field that is not analysed equals one of the values."""

    field: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A number or date lies between bounds."""

    field: str
    lower: Scalar | None = None
    upper: Scalar | None = None
    include_lower: bool = True
    include_upper: bool = True


@dataclass(frozen=True, slots=True)
class Exists:
    """A field that is not analysed is present."""

    field: str


@dataclass(frozen=True, slots=True)
class HasId:
    """The document has one of the ids."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Filter:
    """All of must, one of should if there are any, none of must_not."""

    must: tuple[Condition, ...] = ()
    should: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.must or self.should or self.must_not)


Condition: TypeAlias = "Term | Range | Exists | HasId | Filter"


@dataclass(frozen=True, slots=True)
class Words:
    """What to find in the text.

    Attributes:
        said: The query string, or plain words.
        plain: Whether no character of it has a meaning.
        fields: Fields that words without a field are looked up in, with boosts; empty: all text fields.
        require_all: Whether all words must be found rather than one.
    """

    said: str
    plain: bool = False
    fields: tuple[tuple[str, float], ...] = ()
    require_all: bool = False


@dataclass(frozen=True, slots=True)
class Sort:
    """Order by a field; documents without it come last."""

    field: str
    descending: bool = False


@dataclass(frozen=True, slots=True)
class HighlightOptions:
    """Fragments of these text fields, or of all."""

    fields: tuple[str, ...] = ()
    max_chars: int = 150


@dataclass(frozen=True, slots=True)
class FacetOptions:
    """Count matches by the values of a field."""

    field: str
    limit: int = 10


@dataclass(frozen=True, slots=True)
class Query:
    """A search; without words it finds every document."""

    words: Words | None = None
    filter: Filter = field(default_factory=Filter)
    sort: Sort | None = None
    limit: int = 10
    offset: int = 0
    highlight: HighlightOptions | None = None
    facets: tuple[FacetOptions, ...] = ()


@dataclass(frozen=True, slots=True)
class Highlight:
    """A fragment of a field; spans are (start, end) in characters of text."""

    field: str
    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Facet:
    """Values of a field with their counts, most frequent first, and the count of all others."""

    field: str
    values: tuple[tuple[str, int], ...]
    other_count: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found."""

    document: Document
    score: float
    highlights: tuple[Highlight, ...] = ()


@dataclass(frozen=True, slots=True)
class Results:
    """Hits of a page, and facts of all matches."""

    hits: list[Hit]
    total_count: int
    facets: tuple[Facet, ...] = ()


class SearchIndex(Protocol):
    """Keeps indexes of documents and finds them by words.

    What is written is durable, and visible to the next read, when the call returns. Unknown indexes raise
    NotFoundError.
    """

    async def create_index(self, spec: IndexSpec, *, request_id: str = "") -> Index:
        """Create an index.

        Raises:
            AlreadyExistsError: There is one of that name, not made by the same request_id and spec.
            ResourceExhaustedError: There are too many indexes.
        """
        ...

    async def index(self, name: str) -> Index:
        """One index."""
        ...

    async def spec(self, name: str) -> IndexSpec:
        """What one index was created as; cheaper than `index`."""
        ...

    async def indexes(self, *, after: str = "", limit: int) -> list[Index]:
        """Indexes sorted by name, from the first past `after`."""
        ...

    async def delete_index(self, name: str) -> None:
        """Delete an index and its documents."""
        ...

    async def add(self, index: str, documents: Sequence[Document]) -> Indexed:
        """Index documents, replacing those of the same id; each succeeds or fails by itself.

        Raises:
            ResourceExhaustedError: The disk or the queue is full; nothing is stored.
        """
        ...

    async def document(self, index: str, identifier: str) -> Document:
        """One document.

        Raises:
            NotFoundError: There is none of that id.
        """
        ...

    async def delete(self, index: str, query: Query) -> int:
        """Delete the documents that words and filter of a query match; return how many there were."""
        ...

    async def search(self, index: str, query: Query) -> Results:
        """Find documents.

        Raises:
            InvalidArgumentError: The query string cannot be read (INVALID_QUERY, with `position`).
        """
        ...


def parse_date(text: str) -> datetime:
    """A date of RFC 3339, in UTC and without the part of a second, as indexes keep it.

    Raises:
        ValueError: It is not one, has no offset, or lies outside the years 1678 to 2261.
    """
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no offset from UTC")
        moment = moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError("must be an RFC 3339 date such as 2026-01-31T12:00:00Z") from error
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise ValueError(f"must lie in the years {_FIRST_YEAR} to {_LAST_YEAR}")
    return moment.replace(microsecond=0)


def typed(entry: Field, value: Any) -> Scalar:
    """A JSON value as a field's index sees it.

    Raises:
        ValueError: It is of another type; the text says what is wanted.
    """
    match entry.type:
        case FieldType.TEXT if isinstance(value, str):
            return value
        case FieldType.KEYWORD if isinstance(value, str):
            if len(value.encode()) > MAX_KEYWORD_BYTES:
                raise ValueError(f"is longer than {MAX_KEYWORD_BYTES} bytes")
            return value
        case FieldType.BOOL if isinstance(value, bool):
            return value
        case FieldType.INTEGER if _is_number(value) and value == int(value) and -_INT64 <= value < _INT64:
            return int(value)
        case FieldType.FLOAT if _is_number(value):
            return float(value)
        case FieldType.DATE if isinstance(value, str):
            return parse_date(value)
    raise ValueError(f"must be of type {entry.type}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def typed_values(
    spec: IndexSpec, document: Document, position: int
) -> list[tuple[Field, Scalar]] | DocumentError:
    """What an index takes of a document, or why it refuses it."""
    where = f"documents[{position}]"
    if not 1 <= len(document.id.encode()) <= MAX_ID_BYTES:
        text = f"must be 1 to {MAX_ID_BYTES} bytes"
        return DocumentError(position, document.id[:MAX_ID_BYTES], f"{where}.id", text)
    found: list[tuple[Field, Scalar]] = []
    for entry in spec.fields:
        given = document.fields.get(entry.name)
        if given is None:
            continue
        try:
            values = given if isinstance(given, list) else [given]
            found += [(entry, typed(entry, value)) for value in values if value is not None]
        except ValueError as error:
            return DocumentError(position, document.id, f"{where}.fields.{entry.name}", str(error))
    return found
