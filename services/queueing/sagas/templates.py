"""Requests with references: `${saga.id}`, `${input.path}`, `${results.step.path}` in a JSON value."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAX_DEPTH = 32
_MARK = re.compile(r"\$\$|\$\{([^}]*)\}|\$")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ROOTS = ("saga", "input", "results")


class MissingValueError(Exception):
    """A reference to what is not there; the text names it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference in a template: its text and the field that it stands in."""

    text: str
    field: str

    @property
    def path(self) -> list[str]:
        """Its parts."""
        return self.text[2:-1].split(".")

    @property
    def step(self) -> str | None:
        """The step whose result it refers to; None if it refers to none."""
        root, *rest = self.path
        return rest[0] if root == "results" else None


def references(template: Any, field: str) -> Iterator[Reference]:
    """All references of a template.

    Args:
        template: A JSON value.
        field: Its place in the request, for errors.

    Raises:
        InvalidArgumentError: One is malformed, or the value is nested too deeply.
    """
    yield from _references(template, field, 0)


def _references(value: Any, field: str, depth: int) -> Iterator[Reference]:
    if depth > MAX_DEPTH:
        raise InvalidArgumentError(f"is nested more than {MAX_DEPTH} deep", field=field)
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _references(one, f"{field}.{key}", depth + 1)
    elif isinstance(value, list):
        for position, one in enumerate(value):
            yield from _references(one, f"{field}[{position}]", depth + 1)
    elif isinstance(value, str):
        for mark in _MARK.finditer(value):
            if mark[0] != "$$":
                yield _checked(mark, field)


def _checked(mark: re.Match[str], field: str) -> Reference:
    def refused(why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{mark[0]}: {why}", field=field, reason="INVALID_REFERENCE")

    if mark[1] is None:
        raise refused("a dollar sign is written $$")
    if not _PATH.fullmatch(mark[1]):
        raise refused("must be names with dots between them")
    reference = Reference(mark[0], field)
    root, *rest = reference.path
    if root not in _ROOTS:
        raise refused(f"must begin with {', '.join(_ROOTS)}")
    if root == "saga" and rest != ["id"]:
        raise refused("of the saga there is its id only")
    if root == "results" and not rest:
        raise refused("must name a step")
    return reference


def filled(template: Any, values: Mapping[str, Any]) -> Any:
    """The template with its references replaced.

    A text that is nothing but one reference becomes the value, whatever its type; in longer ones values are
    inserted, those that are no texts as JSON.

    Raises:
        MissingValueError: There is no such value.
    """
    if isinstance(template, dict):
        return {key: filled(one, values) for key, one in template.items()}
    if isinstance(template, list):
        return [filled(one, values) for one in template]
    if not isinstance(template, str):
        return template
    whole = _MARK.fullmatch(template)
    if whole and whole[1] is not None:
        return _value(whole[1].split("."), values)

    def inserted(mark: re.Match[str]) -> str:
        if mark[1] is None:
            return "$"
        value = _value(mark[1].split("."), values)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _MARK.sub(inserted, template)


def _value(path: Sequence[str], values: Any) -> Any:
    found = values
    for part in path:
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise MissingValueError(f"${{{'.'.join(path)}}}: there is no such value")
    return found
