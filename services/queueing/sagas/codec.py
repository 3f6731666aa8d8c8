"""Definitions, sagas and histories as JSON texts; unknown keys of a newer version are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from services.queueing.sagas.definitions import Definition
from services.queueing.sagas.domain import Record, Saga

if TYPE_CHECKING:
    from sqlalchemy import Row

_DEFINITION = TypeAdapter(Definition)
_SAGA = TypeAdapter(Saga)
_RECORD = TypeAdapter(Record)


def definition_text(definition: Definition) -> str:
    """A definition as text."""
    return _DEFINITION.dump_json(definition).decode()


@lru_cache(maxsize=256)
def definition_of(text: str) -> Definition:
    """The definition of a text."""
    return _DEFINITION.validate_json(text)


def record_text(record: Record) -> str:
    """An entry of a history as text."""
    return _RECORD.dump_json(record).decode()


def record_of(text: str) -> Record:
    """The entry of a text."""
    return _RECORD.validate_json(text)


def json_text(value: Any) -> str:
    """A JSON value as text."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def saga_text(saga: Saga) -> str:
    """A saga without its input and results."""
    return _SAGA.dump_json(
        replace(saga, input={}, steps=tuple(replace(step, result=None) for step in saga.steps))
    ).decode()


def saga_of(row: Row[*tuple[Any, ...]]) -> Saga:
    """The saga of a row; without columns `input` and `results` it has none."""
    saga = _SAGA.validate_json(row.document)
    if not hasattr(row, "input"):
        return saga
    if row.results == "{}":
        return replace(saga, input=json.loads(row.input))
    results: dict[str, Any] = json.loads(row.results)
    steps = tuple(replace(step, result=results.get(step.name)) for step in saga.steps)
    return replace(saga, input=json.loads(row.input), steps=steps)
