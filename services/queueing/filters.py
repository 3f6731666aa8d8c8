"""Filters of subscriptions: expressions over a message's attributes, in Pub/Sub's language.

`attributes:key` (there is one), `attributes.key = "v"`, `!=`, `hasPrefix(attributes.key, "v")`, NOT or `-`,
AND, OR (not mixed without parentheses) and parentheses; a key that is no word is written in quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NoReturn

from services.runtime.errors import InvalidArgumentError

MAX_LENGTH = 256
Matches = Callable[[Mapping[str, str]], bool]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_][A-Za-z0-9_-]*)|(?P<sign>!=|[()=:.,-]))"""
)
_MAX_DEPTH = 32


def _everything(_attributes: Mapping[str, str]) -> bool:
    return True


@lru_cache(maxsize=1024)
def compiled(expression: str) -> Matches:
    """The test that an expression means; an empty one lets everything through.

    Raises:
        InvalidArgumentError: It is too long or no expression; the text says where.
    """
    if not expression.strip():
        return _everything
    if len(expression) > MAX_LENGTH:
        raise InvalidArgumentError(f"at most {MAX_LENGTH} characters", field="subscription.filter")
    return _Parser(expression).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                self._fail(at)
            kind = found.lastgroup or ""
            self._tokens.append((kind, found[kind], found.start(kind)))
            at = found.end()
        self._tokens.append(("end", "", len(text)))
        self._next = 0

    def _fail(self, at: int) -> NoReturn:
        raise InvalidArgumentError(
            f"no valid filter at character {at + 1}", field="subscription.filter", reason="INVALID_FILTER"
        )

    def _peek(self) -> str:
        kind, value, _ = self._tokens[self._next]
        return value if kind in {"word", "sign"} else kind

    def _take(self, *wanted: str) -> str:
        kind, value, at = self._tokens[self._next]
        if wanted and value not in wanted and kind not in wanted:
            self._fail(at)
        self._next += 1
        return value

    def parse(self) -> Matches:
        matches = self._terms(0)
        self._take("end")
        return matches

    def _terms(self, depth: int) -> Matches:
        first = self._factor(depth)
        joint = self._peek()
        if joint not in {"AND", "OR"}:
            return first
        terms = [first]
        while self._peek() == joint:
            self._take()
            terms.append(self._factor(depth))
        if self._peek() in {"AND", "OR"}:
            self._fail(self._tokens[self._next][2])  # mixed: the reader would have to guess
        test = all if joint == "AND" else any
        return lambda attributes: test(term(attributes) for term in terms)

    def _factor(self, depth: int) -> Matches:
        if depth > _MAX_DEPTH:
            self._fail(self._tokens[self._next][2])
        if self._peek() in {"NOT", "-"}:
            self._take()
            inner = self._factor(depth + 1)
            return lambda attributes: not inner(attributes)
        if self._peek() == "(":
            self._take()
            inner = self._terms(depth + 1)
            self._take(")")
            return inner
        if self._peek() == "hasPrefix":
            return self._prefix()
        return self._comparison()

    def _prefix(self) -> Matches:
        self._take()
        self._take("(")
        self._take("attributes")
        self._take(".")
        key = self._key()
        self._take(",")
        prefix = self._quoted()
        self._take(")")
        return lambda attributes: key in attributes and attributes[key].startswith(prefix)

    def _comparison(self) -> Matches:
        self._take("attributes")
        if self._take(":", ".") == ":":
            present = self._key()
            return lambda attributes: present in attributes
        key = self._key()
        sign = self._take("=", "!=")
        value = self._quoted()
        if sign == "=":
            return lambda attributes: attributes.get(key) == value
        return lambda attributes: key in attributes and attributes[key] != value

    def _key(self) -> str:
        if self._peek() == "text":
            return self._quoted()
        return self._take("word")

    def _quoted(self) -> str:
        return re.sub(r"\\(.)", r"\1", self._take("text")[1:-1])
