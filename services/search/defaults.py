"""The indexes that exist from the start."""

from __future__ import annotations

from services.search.domain import Field, FieldType, IndexSpec


def _text(name: str) -> Field:
    return Field(name, FieldType.TEXT)


def _keyword(name: str) -> Field:
    return Field(name, FieldType.KEYWORD)


def _date(name: str) -> Field:
    return Field(name, FieldType.DATE)


DEFAULT_INDEXES = (
    IndexSpec(
        "workflows",
        (
            _text("name"),
            _text("description"),
            _keyword("status"),
            _keyword("owner"),
            _keyword("tags"),
            _date("created_at"),
            _date("updated_at"),
        ),
    ),
    IndexSpec(
        "executions",
        (
            _keyword("workflow"),
            _keyword("status"),
            _keyword("trace_id"),
            _text("error"),
            _text("output"),
            _date("started_at"),
            _date("finished_at"),
            Field("duration_s", FieldType.FLOAT),
        ),
    ),
    IndexSpec(
        "logs",
        (
            _text("message"),
            _keyword("level"),
            _keyword("service"),
            _keyword("trace_id"),
            _keyword("logger"),
            _date("at"),
        ),
    ),
)
