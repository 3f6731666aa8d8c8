"""From the domain's queries and filters to the engine's."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import tantivy as engine

from services.runtime.errors import InvalidArgumentError
from services.search.domain import (
    Exists,
    FieldType,
    Filter,
    HasId,
    IndexSpec,
    Range,
    Term,
    Words,
)

if TYPE_CHECKING:
    from services.search.domain import Condition

ID_FIELD = "_id"
MAX_NESTING = 32
"""Parentheses within parentheses: the engine's parser recurses and would overflow the process's stack."""
MAX_CLAUSES = 1024
_TYPES = {
    FieldType.INTEGER: engine.FieldType.Integer,
    FieldType.FLOAT: engine.FieldType.Float,
    FieldType.DATE: engine.FieldType.Date,
}
_POSITION = re.compile(r" at position (\d+)")
_UNKNOWN = re.compile(r"Field does not exist: '(.*)'")
_NOT = re.compile(r'"[^"]*"?|(?<![^\s(])NOT\s+')
_NOT_WORD = re.compile(r"[\W_]+")


def query_to(index: Any, spec: IndexSpec, words: Words | None, matching: Filter) -> tuple[Any, Any]:
    """The engine's query, and the part of it that makes scores and highlights (None without words).

    Raises:
        InvalidArgumentError: The query string cannot be read.
    """
    scored = None if words is None else words_to(index, spec, words)
    clauses = [(engine.Occur.Must, scored)] if scored is not None else []
    if matching:
        unscored = engine.Query.const_score_query(filter_to(index.schema, spec, matching), 0.0)
        clauses.append((engine.Occur.Must, unscored))
    if not clauses:
        return engine.Query.all_query(), None
    return (clauses[0][1] if len(clauses) == 1 else engine.Query.boolean_query(clauses)), scored


def words_to(index: Any, spec: IndexSpec, words: Words) -> Any:
    """The engine's query for words.

    Raises:
        InvalidArgumentError: The query string cannot be read.
    """
    names = [name for name, _ in words.fields] or [
        entry.name for entry in spec.fields if entry.type is FieldType.TEXT
    ]
    # An index without text is searched by its keywords.
    names = names or [entry.name for entry in spec.fields if entry.type is FieldType.KEYWORD] or [ID_FIELD]
    parse = partial(
        index.parse_query,
        default_field_names=names,
        field_boosts=dict(words.fields),
        conjunction_by_default=words.require_all,
    )
    if words.plain:
        # Lower case: AND, OR, NOT and IN have a meaning only as capitals.
        said = " ".join(_NOT_WORD.sub(" ", words.said).lower().split()[:MAX_CLAUSES])
        return parse(said) if said else engine.Query.empty_query()
    _check_size(words.said)
    try:
        return parse(_NOT.sub(_minus, words.said))
    except ValueError as error:
        raise _unreadable(index, words.said, names, str(error)) from error


def _minus(found: re.Match[str]) -> str:
    """`NOT x` as `-x`, no shorter: after AND the engine makes NOT a query of its own that finds nothing."""
    return found[0] if found[0].startswith('"') else found[0].replace("NOT", "   ")[:-1] + "-"


def _check_size(said: str) -> None:
    depth = 0
    for position, character in enumerate(said):
        depth += (character == "(") - (character == ")")
        if depth > MAX_NESTING:
            raise _invalid(f"parentheses nest deeper than {MAX_NESTING}", position)
    if len(said.split()) > MAX_CLAUSES:
        raise _invalid(f"more than {MAX_CLAUSES} words", 0)


def _unreadable(index: Any, said: str, names: list[str], message: str) -> InvalidArgumentError:
    """The error of a query string, with the position that the lenient parser or the text itself tells."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        return _invalid(f"there is no field {unknown[1]!r}", max(said.find(f"{unknown[1]}:"), 0))
    for problem in index.parse_query_lenient(said, names)[1]:
        found = _POSITION.search(str(problem))
        if found:
            reason = _POSITION.sub("", str(problem)).removeprefix("Syntax Error: ").replace("\\", "")
            return _invalid(reason, min(int(found[1]), len(said)))
    if message.startswith("Syntax Error"):
        return _invalid("the query ends too early or has a stray character", len(said))
    return _invalid(message, 0)


def _invalid(message: str, position: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{message} (at position {position})",
        field="query",
        reason="INVALID_QUERY",
        metadata={"position": str(position)},
    )


def filter_to(schema: Any, spec: IndexSpec, matching: Filter) -> Any:
    """The engine's query for a filter."""
    clauses = [(engine.Occur.Must, _condition_to(schema, spec, condition)) for condition in matching.must]
    if matching.should:
        some = [(engine.Occur.Should, _condition_to(schema, spec, entry)) for entry in matching.should]
        clauses.append((engine.Occur.Must, engine.Query.boolean_query(some)))
    if matching.must_not:
        # Exclusions alone match nothing in the engine.
        clauses.append((engine.Occur.Must, engine.Query.all_query()))
        clauses += [(engine.Occur.MustNot, _condition_to(schema, spec, entry)) for entry in matching.must_not]
    return engine.Query.boolean_query(clauses) if clauses else engine.Query.all_query()


def _condition_to(schema: Any, spec: IndexSpec, condition: Condition) -> Any:
    match condition:
        case Term(name, values):
            return engine.Query.term_set_query(schema, name, list(values))
        case Range(name, lower, upper, include_lower, include_upper):
            return engine.Query.range_query(
                schema,
                name,
                _TYPES[spec.field(name, "filter").type],
                lower,
                upper,
                include_lower=include_lower,
                include_upper=include_upper,
            )
        case Exists(name):
            return engine.Query.exists_query(name)
        case HasId(ids):
            return engine.Query.term_set_query(schema, ID_FIELD, list(ids))
        case Filter():
            return filter_to(schema, spec, condition)
