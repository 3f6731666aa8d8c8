"""Between the domain and the engine's points, filters and selectors.

The engine's binding turns `True` into the number 1, so a condition on a truth value cannot be said to it. A
point's truth values are therefore kept a second time, as strings such as `draft=true`, under a key of ours.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

import qdrant_edge as engine

from services.vectors.domain import (
    RESERVED_KEY,
    CollectionSpec,
    Distance,
    Exists,
    Filter,
    HasId,
    Match,
    PayloadType,
    Point,
    Range,
    Selection,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from services.vectors.domain import Condition, Scalar

_NAMESPACE = uuid.UUID("5f0c6d3e-9d0b-4c55-8d6e-3a7f6f1f7a10")
_EXACT_INTEGERS = 2**53
_BOOLS_KEY = "_plexus_bools"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LAST_INDEX = re.compile(r"(?:\[\d*\])+$")
_INDEX = re.compile(r"\[\d+\]")
_DISTANCES = {
    Distance.COSINE: engine.Distance.Cosine,
    Distance.DOT: engine.Distance.Dot,
    Distance.EUCLID: engine.Distance.Euclid,
}
_SCHEMAS = {
    PayloadType.KEYWORD: engine.PayloadSchemaType.Keyword,
    PayloadType.INTEGER: engine.PayloadSchemaType.Integer,
    PayloadType.FLOAT: engine.PayloadSchemaType.Float,
    PayloadType.BOOL: engine.PayloadSchemaType.Keyword,
}


def engine_id(identifier: str) -> uuid.UUID:
    """The engine's id of a point: a UUID made from the caller's."""
    return uuid.uuid5(_NAMESPACE, identifier)


def create_shard(folder: str, spec: CollectionSpec, search_threads: int) -> None:
    """Create the engine's files for a collection."""
    params = engine.EdgeVectorParams(size=spec.dimension, distance=_DISTANCES[spec.distance])
    shard = engine.EdgeShard.create(
        folder, engine.EdgeConfig(vectors=params, max_search_threads=search_threads)
    )
    for index in spec.payload_indexes:
        name = _BOOLS_KEY if index.type is PayloadType.BOOL else index.field
        shard.update(engine.UpdateOperation.create_field_index(name, _SCHEMAS[index.type]))
    shard.flush()
    shard.close()


def points_to(points: Iterable[Point]) -> list[Any]:
    """The engine's points; of two with one id only the later."""
    latest = {point.id: point for point in points}
    return [_point_to(point) for point in latest.values()]


def _point_to(point: Point) -> Any:
    payload = {**point.payload, RESERVED_KEY: point.id}
    bools = sorted({f"{path}={str(value).lower()}" for path, value in _bools(point.payload, "")})
    if bools:
        payload[_BOOLS_KEY] = bools
    vector: Any = point.vector  # the stubs say list; any sequence of numbers is taken, an array fastest
    return engine.Point(engine_id(point.id), vector, payload)


def _bools(value: Any, path: str) -> Iterator[tuple[str, bool]]:
    """The truth values below a payload's value, with their paths as conditions name them."""
    if isinstance(value, bool):
        yield path, value
    elif isinstance(value, dict):
        prefix = f"{path}." if path else ""
        for key, entry in value.items():
            name = key if _PLAIN_KEY.fullmatch(key) else f'"{key}"'
            yield from _bools(entry, prefix + name)
    elif isinstance(value, list):
        for entry in value:
            yield from _bools(entry, path if isinstance(entry, bool) else f"{path}[]")


def point_from(record: Any) -> Point:
    """The domain's point of an engine record."""
    payload = record.payload or {}
    payload.pop(_BOOLS_KEY, None)
    return Point(payload.pop(RESERVED_KEY), record.vector, payload)


def payload_selector(selection: Selection) -> Any:
    """The engine's payload selector; always with the key that holds the id."""
    if not selection.payload:
        return [RESERVED_KEY]
    if selection.include:
        return engine.PayloadSelector.Include([RESERVED_KEY, *selection.include])
    if selection.exclude:
        return engine.PayloadSelector.Exclude([_BOOLS_KEY, *selection.exclude])
    return engine.PayloadSelector.Exclude([_BOOLS_KEY])


def filter_to(matching: Filter) -> Any:
    """The engine's filter; None if there is no condition."""
    if not matching:
        return None
    return engine.Filter(
        must=[_condition_to(condition) for condition in matching.must] or None,
        should=[_condition_to(condition) for condition in matching.should] or None,
        must_not=[_condition_to(condition) for condition in matching.must_not] or None,
    )


def _condition_to(condition: Condition) -> Any:
    match condition:
        case Match(field, values):
            return _match_to(field, values)
        case Range(field, gt, gte, lt, lte):
            return engine.FieldCondition(field, range=engine.RangeFloat(gt=gt, gte=gte, lt=lt, lte=lte))
        case Exists(field):
            return engine.Filter(must_not=[engine.IsEmptyCondition(field)])
        case HasId(ids):
            return engine.HasIdCondition({engine_id(identifier) for identifier in ids})
        case Filter():
            # An empty filter matches everything.
            return filter_to(condition) or engine.Filter()


def _match_to(field: str, values: tuple[Scalar, ...]) -> Any:
    """One condition for any of the values; the engine matches several strings, or integers, at a time."""
    texts = [value for value in values if isinstance(value, str)]
    integers = [value for value in values if type(value) is int and abs(value) < _EXACT_INTEGERS]
    conditions: list[Any] = []
    if texts:
        conditions.append(engine.FieldCondition(field, match=_any_of(texts)))
    if integers:
        conditions.append(engine.FieldCondition(field, match=_any_of(integers)))
    for value in values:
        if isinstance(value, bool):
            said = f"{_LAST_INDEX.sub('', _INDEX.sub('[]', field))}={str(value).lower()}"
            conditions.append(engine.FieldCondition(_BOOLS_KEY, match=engine.MatchValue(said)))
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) >= _EXACT_INTEGERS):
            number = float(value)
            conditions.append(engine.FieldCondition(field, range=engine.RangeFloat(gte=number, lte=number)))
    return conditions[0] if len(conditions) == 1 else engine.Filter(should=conditions)


def _any_of(values: list[Any]) -> Any:
    return engine.MatchValue(values[0]) if len(values) == 1 else engine.MatchAny(values)
