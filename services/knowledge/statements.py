"""What a passage says, statement by statement: sentences, list items and table rows, with exact offsets."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from services.knowledge.citations import SENTENCE_END

if TYPE_CHECKING:
    from collections.abc import Iterator

_FENCE = re.compile(r"^[ \t]*(```|~~~)")
_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d{1,3}[.)])[ \t]+")
_ROW = re.compile(r"^[ \t]*\|(.*)\|[ \t]*$")
_RULE = re.compile(r"^[ \t|:=*_-]+$")
_SKIPPED = re.compile(r"^[ \t]*(#{1,6}[ \t]|<!--)")
_CODE = re.compile(r"^`[^`]*`$|>>>|^(?:import|from) \S+|\s=\s['\"(\[\w]")
_INLINE = re.compile(r"`[^`]*`")
_MIN_WORDS = 4
_MIN_LETTERS = 0.7
_MAX_SHOWN = 400
"""Longest code or list that is told with the sentence that leads to it, in characters."""


class Kind(Enum):
    """How a statement stands in its document."""

    PROSE = auto()
    ITEM = auto()
    ROW = auto()
    CODE = auto()


class Statement(NamedTuple):
    """A statement: `start` and `end` are its place in the passage's text; prose reads as one line."""

    text: str
    start: int
    end: int
    kind: Kind


def statements(text: str) -> list[Statement]:
    """The statements of a passage in order.

    A sentence that ends with a colon takes the code or the list with it that it leads to. Headings, code
    alone and what is too short to say something are left out, and so is the torn beginning that an overlap
    gives a passage.
    """
    units = list(_units(text))
    found: list[Statement] = []
    for number, unit in enumerate(units):
        if unit.kind is Kind.CODE:
            continue
        parts = [_row(unit)] if unit.kind is Kind.ROW else _sentences(text, unit)
        if parts and parts[-1].text.endswith(":"):
            led = _led_to(parts.pop(), units[number + 1 :])
            parts += [led] if led else []
        found += parts
    if found and found[0].start == 0 and found[0].kind is Kind.PROSE and found[0].text[:1].islower():
        found.pop(0)
    return [each for each in found if _says_something(each)]


def _says_something(statement: Statement) -> bool:
    first = statement.text.split("\n", 1)[0]
    bare = _INLINE.sub("x", first)
    letters = sum(character.isalpha() or character.isspace() for character in bare)
    return (
        len(first.split()) >= _MIN_WORDS
        and not _CODE.search(bare)
        and not _CODE.match(first)
        and (statement.kind is Kind.ROW or letters >= _MIN_LETTERS * len(bare))
    )


def _units(text: str) -> Iterator[Statement]:
    """Paragraphs, list items, table rows and code blocks as they stand in the text."""
    start: int | None = None
    kind = Kind.PROSE
    end = position = 0
    fenced = False
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        bare = line.rstrip()
        fence = _FENCE.match(bare)
        row = None if fenced else _ROW.match(bare)
        item = None if fenced or row else _ITEM.match(bare)
        breaks = not fenced and (row or item or not bare or _SKIPPED.match(bare) or _RULE.match(bare))
        if (breaks or fence) and start is not None:
            yield Statement(text[start:end], start, end, kind)
            start = None
        if fence:
            fenced = not fenced
            kind = Kind.CODE if fenced else Kind.PROSE
        elif row and not _RULE.match(bare):
            following = lines[number + 1].rstrip() if number + 1 < len(lines) else ""
            if not (_RULE.match(following) and _ROW.match(following)):  # else it is the table's head
                yield Statement(bare, position, position + len(bare), Kind.ROW)
        elif item:
            start, end, kind = position + item.end(), position + len(bare), Kind.ITEM
        elif not breaks and bare:
            if start is None:
                start = position
                kind = Kind.CODE if fenced else Kind.PROSE
            end = position + len(bare)
        position += len(line)
    if start is not None:
        yield Statement(text[start:end], start, end, kind)


def _row(unit: Statement) -> Statement:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", unit.text.strip().strip("|"))]
    return unit._replace(text=" — ".join(cell for cell in cells if cell))


def _sentences(text: str, unit: Statement) -> list[Statement]:
    found: list[Statement] = []
    position = unit.start
    ends = [*SENTENCE_END.finditer(text, unit.start, unit.end), None]
    for match in ends:
        part = text[position : match.start() if match else unit.end]
        start = position + len(part) - len(part.lstrip())
        words = " ".join(part.split())
        if words:
            found.append(Statement(words, start, start + len(part.strip()), unit.kind))
        position = match.end() if match else position
    return found


def _led_to(sentence: Statement, following: list[Statement]) -> Statement | None:
    """The sentence with the code or list after it; None if there is none, or too much of it."""
    if not following:
        return None
    first = following[0]
    if first.kind is Kind.CODE:
        if len(first.text) > _MAX_SHOWN:
            return None
        block = f" `{first.text.strip()}`" if "\n" not in first.text.strip() else f"\n```\n{first.text}\n```"
        return sentence._replace(text=sentence.text + block, end=first.end)
    items: list[Statement] = []
    for unit in following:
        if unit.kind is not Kind.ITEM or sum(len(item.text) for item in items) + len(unit.text) > _MAX_SHOWN:
            break
        items.append(unit)
    if not items:
        return None
    listed = "; ".join(" ".join(item.text.split()).rstrip(".;,") for item in items)
    return sentence._replace(text=f"{sentence.text} {listed}.", end=items[-1].end)
