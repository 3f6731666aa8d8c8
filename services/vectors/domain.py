"""Vectors: collections, points, filters, and what every store and embedder does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from services.runtime.errors import FieldViolation, InvalidArgumentError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Sequence
    from datetime import datetime

Scalar: TypeAlias = "str | int | float | bool"
Vector: TypeAlias = "array[float] | list[float]"
"""float32 numbers: an array of type code `f`, or a list."""

RESERVED_PREFIX = "_plexus_"
"""Payload keys that callers may not use begin with this."""
RESERVED_KEY = f"{RESERVED_PREFIX}id"
"""Payload key under which stores keep a point's id."""
MAX_DIMENSION = 65_536
MAX_ID_BYTES = 256
MAX_PAYLOAD_INDEXES = 32
MAX_CONDITIONS = 256
MAX_FILTER_DEPTH = 8
MAX_ALTERNATIVES = 1000
MAX_VIOLATIONS = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PATH_KEY = r'(?:[A-Za-z0-9_-]+|"[^"\\]+")(?:\[\d*\])*'
_PATH = re.compile(rf"{_PATH_KEY}(?:\.{_PATH_KEY})*")


class Distance(StrEnum):
    """How nearness is measured."""

    COSINE = "cosine"
    DOT = "dot"
    EUCLID = "euclid"


class PayloadType(StrEnum):
    """Type of an indexed payload field."""

    KEYWORD = "keyword"
    INTEGER = "integer"
    FLOAT = "float"
    BOOL = "bool"


@dataclass(frozen=True, slots=True)
class PayloadIndex:
    """An index on one payload field."""

    field: str
    type: PayloadType


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a caller says of a collection; checked when made.

    Attributes:
        name: Unique name.
        dimension: Numbers in each vector.
        distance: How nearness is measured.
        embedding_model: Model that turns text into vectors; empty for none.
        payload_indexes: Payload fields whose filters are fast.
    """

    name: str
    dimension: int
    distance: Distance = Distance.COSINE
    embedding_model: str = ""
    payload_indexes: tuple[PayloadIndex, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgumentError(
                "must be 1 to 128 letters, digits, _ - . with a letter or digit first",
                field="collection.name",
            )
        if not 1 <= self.dimension <= MAX_DIMENSION:
            raise InvalidArgumentError(f"must be 1 to {MAX_DIMENSION}", field="collection.dimension")
        if len(self.embedding_model) > 256:  # noqa: PLR2004 - generous for a model's name
            raise InvalidArgumentError("at most 256 characters", field="collection.embedding_model")
        if len(self.payload_indexes) > MAX_PAYLOAD_INDEXES:
            raise InvalidArgumentError(f"at most {MAX_PAYLOAD_INDEXES}", field="collection.payload_indexes")
        for number, index in enumerate(self.payload_indexes):
            check_path(index.field, f"collection.payload_indexes[{number}].field")
        if len({index.field for index in self.payload_indexes}) < len(self.payload_indexes):
            raise InvalidArgumentError("a field is there twice", field="collection.payload_indexes")


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection as it is."""

    spec: CollectionSpec
    created_at: datetime
    point_count: int


@dataclass(frozen=True, slots=True)
class Point:
    """A vector with an id and a payload; `vector` is None where a read did not ask for it."""

    id: str
    vector: Vector | None
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ScoredPoint:
    """A point found, with its score: similarity, or the distance with Euclid."""

    point: Point
    score: float


@dataclass(frozen=True, slots=True)
class Match:
    """A payload field equals one of the values."""

    field: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """A payload field's number lies between bounds."""

    field: str
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None


@dataclass(frozen=True, slots=True)
class Exists:
    """A payload field is present and neither null nor an empty list."""

    field: str


@dataclass(frozen=True, slots=True)
class HasId:
    """The point has one of the ids."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Filter:
    """All of must, one of should if there are any, none of must_not."""

    must: tuple[Condition, ...] = ()
    should: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.must or self.should or self.must_not)


Condition: TypeAlias = "Match | Range | Exists | HasId | Filter"


@dataclass(frozen=True, slots=True)
class Selection:
    """What a read returns of each point.

    Attributes:
        payload: Whether any payload at all.
        include: Only these fields, if there are any.
        exclude: All but these.
        vector: Whether the vector.
    """

    payload: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    vector: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Points of a page and where the next begins; None at the end."""

    points: list[Point]
    next: str | None


@dataclass(frozen=True, slots=True)
class Query:
    """A search."""

    vector: Vector
    limit: int = 10
    offset: int = 0
    filter: Filter = field(default_factory=Filter)
    score_threshold: float | None = None
    selection: Selection = field(default_factory=Selection)


class TextEmbedder(Protocol):
    """Turns texts into vectors."""

    async def embed(self, model: str, texts: Sequence[str]) -> list[Vector]:
        """Vectors of the texts, in order.

        Raises:
            NotFoundError: There is no such model.
            UnavailableError: The embedder is away.
        """
        ...


class VectorStore(Protocol):
    """Keeps collections of points and finds the nearest.

    What is written is durable, and visible to the next read, when the call returns. Unknown collections raise
    NotFoundError. Vectors are checked by the caller (`check_vectors`).
    """

    async def create_collection(self, spec: CollectionSpec, *, request_id: str = "") -> Collection:
        """Create a collection.

        Raises:
            AlreadyExistsError: There is one of that name, not made by the same request_id and spec.
            ResourceExhaustedError: There are too many collections.
        """
        ...

    async def collection(self, name: str) -> Collection:
        """One collection."""
        ...

    async def spec(self, name: str) -> CollectionSpec:
        """What one collection was created as; cheaper than `collection`."""
        ...

    async def collections(self, *, after: str = "", limit: int) -> list[Collection]:
        """Collections sorted by name, from the first past `after`."""
        ...

    async def delete_collection(self, name: str) -> None:
        """Delete a collection and its points."""
        ...

    async def upsert(self, collection: str, points: Sequence[Point]) -> int:
        """Insert or replace points, all or none; of two with one id the later counts.

        Returns:
            How many points were given.

        Raises:
            ResourceExhaustedError: The disk or the queue is full.
        """
        ...

    async def search(self, collection: str, query: Query) -> list[ScoredPoint]:
        """The nearest points, best first."""
        ...

    async def points(self, collection: str, ids: Sequence[str], selection: Selection) -> list[Point]:
        """Points by id, in the order asked, without the unknown."""
        ...

    async def scan(
        self, collection: str, matching: Filter, selection: Selection, *, after: str | None, limit: int
    ) -> Page:
        """A page of all points that match, in a stable order; `after` is the `next` of the page before."""
        ...

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """Delete points by id; return how many were there."""
        ...

    async def delete_matching(self, collection: str, matching: Filter) -> int:
        """Delete points that match; return how many there were."""
        ...

    async def count(self, collection: str, matching: Filter) -> int:
        """How many points match, exactly."""
        ...


def check_path(path: str, where: str) -> None:
    """Check a payload path.

    Raises:
        InvalidArgumentError: It is malformed or names the reserved key.
    """
    if len(path) > 256 or not _PATH.fullmatch(path):  # noqa: PLR2004 - generous for a path
        raise InvalidArgumentError(
            "must be keys of letters, digits, _ and -, or keys in double quotes, joined by dots", field=where
        )
    if path.replace('"', "").startswith(RESERVED_PREFIX):
        raise InvalidArgumentError(f"keys that begin with {RESERVED_PREFIX} are reserved", field=where)


def check_id(identifier: str, where: str) -> None:
    """Check a point's id.

    Raises:
        InvalidArgumentError: It is empty or too long.
    """
    if not 1 <= len(identifier.encode()) <= MAX_ID_BYTES:
        raise InvalidArgumentError(f"must be 1 to {MAX_ID_BYTES} bytes", field=where)


def vector_problem(vector: Vector, spec: CollectionSpec) -> str | None:
    """What is wrong with a vector for a collection; None if nothing is."""
    if len(vector) != spec.dimension:
        return f"has {len(vector)} numbers, the collection's vectors have {spec.dimension}"
    # The sum of 65,536 float32 numbers fits into a double, so it is finite exactly if all of them are.
    if not isfinite(sum(vector)):
        return "has a number that is NaN or infinite"
    if spec.distance is Distance.COSINE and not any(vector):
        return "is all zeros, which has no direction for cosine"
    return None


def check_vectors(vectors: Iterable[tuple[str, Vector]], spec: CollectionSpec) -> None:
    """Check vectors for a collection.

    Args:
        vectors: Each with its path in the request.
        spec: The collection.

    Raises:
        InvalidArgumentError: With the path of each wrong one, at most 20.
    """
    violations: list[FieldViolation] = []
    for where, vector in vectors:
        problem = vector_problem(vector, spec)
        if problem is not None:
            violations.append(FieldViolation(where, problem))
            if len(violations) == MAX_VIOLATIONS:
                break
    if violations:
        first = violations[0]
        raise InvalidArgumentError(
            f"{first.field} {first.description}",
            violations=violations,
            reason="INVALID_VECTOR",
            metadata={"collection": spec.name, "dimension": str(spec.dimension)},
        )
