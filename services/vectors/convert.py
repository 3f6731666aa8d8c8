"""Between vectors messages and the domain; every error names the field's path in the request."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from plexus.vectors.v1 import vectors_pb2
from services.runtime.bounds import check_batch, check_count
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError
from services.vectors.domain import (
    MAX_ALTERNATIVES,
    MAX_CONDITIONS,
    MAX_FILTER_DEPTH,
    RESERVED_PREFIX,
    Collection,
    CollectionSpec,
    Distance,
    Exists,
    Filter,
    HasId,
    Match,
    PayloadIndex,
    PayloadType,
    Point,
    Range,
    Selection,
    check_id,
    check_path,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.vectors.config import VectorsConfig
    from services.vectors.domain import Condition, Scalar, ScoredPoint, Vector

_FLOAT_BYTES = 4
_EXACT_INTEGERS = 2**53
MAX_READ_IDS = 1000
_DISTANCES = {
    vectors_pb2.DISTANCE_UNSPECIFIED: Distance.COSINE,
    vectors_pb2.DISTANCE_COSINE: Distance.COSINE,
    vectors_pb2.DISTANCE_DOT: Distance.DOT,
    vectors_pb2.DISTANCE_EUCLID: Distance.EUCLID,
}
_DISTANCE_NUMBERS = {distance: number for number, distance in _DISTANCES.items() if number}
_PAYLOAD_TYPES = {
    vectors_pb2.PAYLOAD_TYPE_KEYWORD: PayloadType.KEYWORD,
    vectors_pb2.PAYLOAD_TYPE_INTEGER: PayloadType.INTEGER,
    vectors_pb2.PAYLOAD_TYPE_FLOAT: PayloadType.FLOAT,
    vectors_pb2.PAYLOAD_TYPE_BOOL: PayloadType.BOOL,
}
_PAYLOAD_TYPE_NUMBERS = {kind: number for number, kind in _PAYLOAD_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Draft:
    """A point of a request: with a vector, or with a text that becomes one."""

    id: str
    vector: Vector | None
    text: str | None
    payload: dict[str, Any]


def spec_from(message: vectors_pb2.Collection) -> CollectionSpec:
    """The domain's collection.

    Raises:
        InvalidArgumentError: A field is malformed.
    """
    if message.distance not in _DISTANCES:
        raise InvalidArgumentError("is not a known distance", field="collection.distance")
    indexes = []
    for number, index in enumerate(message.payload_indexes):
        if index.type not in _PAYLOAD_TYPES:
            where = f"collection.payload_indexes[{number}].type"
            raise InvalidArgumentError("must be one of the known types", field=where)
        indexes.append(PayloadIndex(index.field, _PAYLOAD_TYPES[index.type]))
    return CollectionSpec(
        name=message.name,
        dimension=message.dimension,
        distance=_DISTANCES[message.distance],
        embedding_model=message.embedding_model,
        payload_indexes=tuple(indexes),
    )


def collection_to(collection: Collection) -> vectors_pb2.Collection:
    """The proto's collection."""
    spec = collection.spec
    message = vectors_pb2.Collection(
        name=spec.name,
        dimension=spec.dimension,
        distance=_DISTANCE_NUMBERS[spec.distance],
        embedding_model=spec.embedding_model,
        payload_indexes=[
            vectors_pb2.PayloadIndex(field=index.field, type=_PAYLOAD_TYPE_NUMBERS[index.type])
            for index in spec.payload_indexes
        ],
        point_count=collection.point_count,
    )
    message.create_time.FromDatetime(collection.created_at)
    return message


def drafts_from(points: Sequence[vectors_pb2.Point], config: VectorsConfig) -> list[Draft]:
    """The points of an upsert.

    Raises:
        InvalidArgumentError: The batch is empty or too large, or a point is malformed.
    """
    check_batch(len(points), config.max_batch_points, "points")
    return [draft_from(point, f"points[{number}]", config) for number, point in enumerate(points)]


def draft_from(point: vectors_pb2.Point, where: str, config: VectorsConfig) -> Draft:
    """One point of an upsert.

    Raises:
        InvalidArgumentError: It is malformed.
    """
    check_id(point.id, f"{where}.id")
    vector, text = None, None
    match point.WhichOneof("source"):
        case "vector":
            vector = vector_from(point.vector, f"{where}.vector")
        case "text":
            text = text_from(point.text, f"{where}.text", config)
        case _:
            raise InvalidArgumentError("has neither a vector nor a text", field=f"{where}.vector")
    if point.payload.ByteSize() > config.max_payload_bytes:
        raise InvalidArgumentError(f"at most {config.max_payload_bytes} bytes", field=f"{where}.payload")
    return Draft(point.id, vector, text, payload_from(point.payload, f"{where}.payload"))


def vector_from(message: vectors_pb2.Vector, where: str) -> Vector:
    """The numbers of a vector; their count and values are checked with the collection.

    Raises:
        InvalidArgumentError: Not exactly one form is set, or `packed` is no whole number of floats.
    """
    if bool(message.values) == bool(message.packed):
        raise InvalidArgumentError("exactly one of values and packed must be set", field=where)
    numbers = array("f")
    if not message.packed:
        numbers.extend(message.values)
        return numbers
    if len(message.packed) % _FLOAT_BYTES:
        raise InvalidArgumentError("must have four bytes a number", field=f"{where}.packed")
    numbers.frombytes(message.packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def vector_to(vector: Vector, form: vectors_pb2.VectorFormat.ValueType) -> vectors_pb2.Vector:
    """The proto's vector in a form."""
    if form != vectors_pb2.VECTOR_FORMAT_PACKED:
        return vectors_pb2.Vector(values=vector)
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return vectors_pb2.Vector(packed=numbers.tobytes())


def text_from(text: str, where: str, config: VectorsConfig) -> str:
    """A text to embed.

    Raises:
        InvalidArgumentError: It is blank or too long.
    """
    if not text.strip():
        raise InvalidArgumentError("is blank", field=where)
    if len(text) > config.max_text_bytes or len(text.encode()) > config.max_text_bytes:
        raise InvalidArgumentError(f"at most {config.max_text_bytes} bytes of UTF-8", field=where)
    return text


def payload_from(struct: Any, where: str) -> dict[str, Any]:
    """A payload; whole numbers become integers, as they were before JSON.

    Raises:
        InvalidArgumentError: A reserved key, or a number that is NaN or infinite.
    """
    payload = {key: _value_from(value, where) for key, value in struct.fields.items()}
    for key in payload:
        if key.startswith(RESERVED_PREFIX):
            raise InvalidArgumentError(f"keys that begin with {RESERVED_PREFIX} are reserved", field=where)
    return payload


def _value_from(value: Any, where: str) -> Any:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return _number_from(value.number_value, where)
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _value_from(entry, where) for key, entry in value.struct_value.fields.items()}
        case "list_value":
            return [_value_from(entry, where) for entry in value.list_value.values]
        case _:
            return None


def _number_from(number: float, where: str) -> int | float:
    if not isfinite(number):
        raise InvalidArgumentError("has a number that is NaN or infinite", field=where)
    return int(number) if number.is_integer() and abs(number) < _EXACT_INTEGERS else number


def point_to(point: Point, form: vectors_pb2.VectorFormat.ValueType) -> vectors_pb2.Point:
    """The proto's point."""
    message = vectors_pb2.Point(id=point.id)
    if point.vector is not None:
        message.vector.CopyFrom(vector_to(point.vector, form))
    if point.payload:
        message.payload.update(point.payload)
    return message


def scored_to(found: ScoredPoint, form: vectors_pb2.VectorFormat.ValueType) -> vectors_pb2.ScoredPoint:
    """The proto's scored point."""
    return vectors_pb2.ScoredPoint(point=point_to(found.point, form), score=found.score)


def selection_from(
    payload: vectors_pb2.PayloadSelector, form: vectors_pb2.VectorFormat.ValueType
) -> Selection:
    """What to return.

    Raises:
        InvalidArgumentError: A path is malformed, or include and exclude are both set.
    """
    if payload.include and payload.exclude:
        raise InvalidArgumentError("not together with include", field="payload.exclude")
    for name in ("include", "exclude"):
        paths = getattr(payload, name)
        check_count(len(paths), MAX_ALTERNATIVES, f"payload.{name}")
        for number, path in enumerate(paths):
            check_path(path, f"payload.{name}[{number}]")
    return Selection(
        payload=not payload.none,
        include=tuple(payload.include),
        exclude=tuple(payload.exclude),
        vector=form in (vectors_pb2.VECTOR_FORMAT_VALUES, vectors_pb2.VECTOR_FORMAT_PACKED),
    )


def filter_from(message: vectors_pb2.Filter, where: str = "filter") -> Filter:
    """The domain's filter.

    Raises:
        InvalidArgumentError: A condition is malformed, or there are too many or too deep.
    """
    budget = [MAX_CONDITIONS]
    return _filter_from(message, where, budget, MAX_FILTER_DEPTH)


def _filter_from(message: vectors_pb2.Filter, where: str, budget: list[int], depth: int) -> Filter:
    if depth == 0:
        raise InvalidArgumentError(f"nests deeper than {MAX_FILTER_DEPTH}", field=where)
    parts: dict[str, tuple[Condition, ...]] = {}
    for name in ("must", "should", "must_not"):
        conditions = getattr(message, name)
        budget[0] -= len(conditions)
        if budget[0] < 0:
            raise InvalidArgumentError(f"has more than {MAX_CONDITIONS} conditions", field="filter")
        parts[name] = tuple(
            _condition_from(condition, f"{where}.{name}[{number}]", budget, depth)
            for number, condition in enumerate(conditions)
        )
    return Filter(**parts)


def _condition_from(message: vectors_pb2.Condition, where: str, budget: list[int], depth: int) -> Condition:
    match message.WhichOneof("condition"):
        case "match":
            return _match_from(message.match, f"{where}.match")
        case "range":
            return _range_from(message.range, f"{where}.range")
        case "exists":
            check_path(message.exists.field, f"{where}.exists.field")
            return Exists(message.exists.field)
        case "has_id":
            check_count(len(message.has_id.ids), MAX_ALTERNATIVES, f"{where}.has_id.ids")
            return HasId(tuple(message.has_id.ids))
        case "filter":
            return _filter_from(message.filter, f"{where}.filter", budget, depth - 1)
        case _:
            raise InvalidArgumentError("has no condition", field=where)


def _match_from(message: vectors_pb2.Match, where: str) -> Match:
    check_path(message.field, f"{where}.field")
    check_count(len(message.any_of), MAX_ALTERNATIVES, f"{where}.any_of")
    values = [_scalar_from(value, f"{where}.any_of[{n}]") for n, value in enumerate(message.any_of)]
    if message.HasField("value"):
        values.append(_scalar_from(message.value, f"{where}.value"))
    if not values:
        raise InvalidArgumentError("must have a value", field=f"{where}.value")
    return Match(message.field, tuple(values))


def _scalar_from(value: Any, where: str) -> Scalar:
    found = _value_from(value, where)
    if not isinstance(found, str | int | float):
        raise InvalidArgumentError("must be a string, a number or a bool", field=where)
    return found


def _range_from(message: vectors_pb2.Range, where: str) -> Range:
    check_path(message.field, f"{where}.field")
    bounds = {name: getattr(message, name) for name in ("gt", "gte", "lt", "lte") if message.HasField(name)}
    if not bounds:
        raise InvalidArgumentError("must have a bound", field=where)
    for name, bound in bounds.items():
        if not isfinite(bound):
            raise InvalidArgumentError("must be finite", field=f"{where}.{name}")
    return Range(message.field, **bounds)


def embedding_model(spec: CollectionSpec, where: str) -> str:
    """The model of a collection whose request has text.

    Raises:
        FailedPreconditionError: It has none.
    """
    if not spec.embedding_model:
        raise FailedPreconditionError(
            f"{where}: collection {spec.name} has no embedding model, so it takes vectors only",
            reason="NO_EMBEDDING_MODEL",
            metadata={"collection": spec.name, "field": where},
        )
    return spec.embedding_model
