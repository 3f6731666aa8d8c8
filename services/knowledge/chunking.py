"""Cutting text along its structure: headings, paragraphs, code blocks; offsets are exact."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from services.knowledge.domain import Chunk, ChunkingPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$")
_FENCE = re.compile(r"^[ \t]*(```|~~~)")
_MARKS = re.compile(r"`+|(?<![\w\\])(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)|\\(?=[^\w\s])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def plain(text: str) -> str:
    """A line of Markdown without its marks for code and emphasis and without escapes."""
    return _MARKS.sub(lambda match: match[2] or "", text)


class _Block(NamedTuple):
    start: int
    end: int
    headings: tuple[str, ...]


def _blocks(text: str) -> Iterator[_Block]:
    """Paragraphs and code blocks with the headings above them; a heading itself is no block."""
    headings: list[tuple[int, str]] = []
    start: int | None = None
    end = position = 0
    fenced = False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        heading = None if fenced else _HEADING.match(line.rstrip("\n"))
        closes = not fenced and (not bare or heading is not None)
        if closes and start is not None:
            yield _Block(start, end, tuple(title for _, title in headings))
            start = None
        if heading:
            level = len(heading[1])
            headings = [pair for pair in headings if pair[0] < level]
            headings.append((level, plain(heading[2])))
        elif bare or fenced:
            if start is None:
                start = position
            if bare:
                end = position + len(line.rstrip())
            if _FENCE.match(line):
                fenced = not fenced
        position += len(line)
    if start is not None:
        yield _Block(start, end, tuple(title for _, title in headings))


def _split(text: str, block: _Block, limit: int) -> Iterator[_Block]:
    """A block in parts of at most `limit` characters, cut after sentences or lines where there are any."""
    start = block.start
    while block.end - start > limit:
        window = text[start : start + limit]
        cuts = [match.end() for match in _SENTENCE_END.finditer(window)] or [
            match.end() for match in re.finditer(r"\n|\s", window)
        ]
        cut = next((place for place in reversed(cuts) if place > limit // 2), limit)
        end = start + len(window[:cut].rstrip())
        yield _Block(start, max(end, start + 1), block.headings)
        start += cut
    rest = text[start : block.end]
    start += len(rest) - len(rest.lstrip())
    if start < block.end:
        yield _Block(start, block.end, block.headings)


def _overlap_start(text: str, start: int, end: int, overlap: int) -> int:
    """Where the repeated tail of a chunk begins: after a sentence or a word, at most `overlap` back."""
    lowest = max(start + 1, end - overlap)
    tail = text[lowest:end]
    sentences = [match.end() for match in _SENTENCE_END.finditer(tail)]
    words = [match.end() for match in re.finditer(r"\s+", tail)]
    cut = (sentences or words or [len(tail)])[0]
    return lowest + cut


def chunk(text: str, policy: ChunkingPolicy) -> list[Chunk]:
    """Cut a text.

    Blocks below one heading are gathered until the target is reached; a longer block is split. A chunk never
    spans two sections, and begins with the tail of the one before it in the same section.
    """
    spans: list[_Block] = []
    current: _Block | None = None
    for block in _blocks(text):
        for part in _split(text, block, policy.target):
            fits = (
                current is not None
                and current.headings == part.headings
                and part.end - current.start <= policy.target
            )
            if current is not None and fits:
                current = _Block(current.start, part.end, part.headings)
                continue
            if current is not None:
                spans.append(current)
            start = part.start
            if current is not None and current.headings == part.headings and policy.overlap:
                start = min(start, _overlap_start(text, current.start, current.end, policy.overlap))
            current = _Block(start, part.end, part.headings)
    if current is not None:
        spans.append(current)
    return [
        Chunk(number, span.start, span.end, text[span.start : span.end], span.headings)
        for number, span in enumerate(spans)
    ]


def title_of(text: str, fallback: str) -> str:
    """The first heading of a text, else the fallback."""
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading:
            return plain(heading[2])
    return fallback
