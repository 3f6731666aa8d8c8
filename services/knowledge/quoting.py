"""Answering in the documents' own words: which statements of the passages answer a question."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from services.knowledge.citations import words
from services.knowledge.statements import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from services.knowledge.domain import Passage
    from services.knowledge.statements import Statement

_MEANING, _HEADING, _WORDS = 0.7, 0.2, 0.15
"""What counts: likeness of the statement, of the headings above it, and shared words."""
_RANK = 0.08
"""What the first passage has ahead of the last, shrinking with the rank."""
_TERSE = 0.1
"""What a table row lacks against a sentence that says the same."""
_MOST = 3
_NEAR_BEST = 0.85
"""Share of the best statement's relevance that another one needs."""
_SAME = 0.8
"""Cosine from which two statements say the same."""
_UNRELATED = 0.35
"""Cosine of question and best statement below which nothing answers the question."""
_RELATED = 0.65
"""The same if the passages lack more than half of the question's words."""
_NAME = re.compile(r"(?:^|\s)([A-Za-z_]\w*(?:\.\w+)*\(\)|[A-Za-z_]\w*(?:\.\w+)+)$")


def choose(
    question: str,
    vector: NDArray[np.float32],
    passages: Sequence[Passage],
    found: Sequence[tuple[int, Statement]],
    vectors: NDArray[np.float32],
    headings: NDArray[np.float32],
) -> list[int]:
    """The statements that answer a question, in an order that reads well; none if nothing answers it.

    The most relevant ones that differ from each other (Carbonell and Goldstein's MMR, with a threshold),
    those of the best one's passage first, each passage's in the order of its text.

    Args:
        question: The question.
        vector: Its unit vector.
        passages: The passages, best first.
        found: The statements with the positions of their passages.
        vectors: Unit vectors of the statements.
        headings: Unit vectors of the passages' headings.

    Returns:
        Positions in `found`.
    """
    if not found:
        return []
    likeness = vectors @ vector
    asked = words(question)
    told = frozenset().union(*(words(" ".join((*each.headings, each.text))) for each in passages))
    known = len(asked & told) > len(asked) / 2
    if likeness.max() < (_UNRELATED if known or not asked else _RELATED):
        return []
    above = headings @ vector
    relevance = np.array(
        [
            _MEANING * likeness[position]
            + _HEADING * above[owner]
            + _WORDS * len(asked & words(statement.text)) / max(1, len(asked))
            + _RANK / (1 + owner)
            - _TERSE * (statement.kind is Kind.ROW)
            for position, (owner, statement) in enumerate(found)
        ]
    )
    chosen: list[int] = []
    for position in map(int, np.argsort(-relevance)):
        if len(chosen) == _MOST or relevance[position] < _NEAR_BEST * relevance.max():
            break
        differs = all(vectors[position] @ vectors[other] < _SAME for other in chosen)
        if differs and not any(_overlap(found[position], found[other]) for other in chosen):
            chosen.append(position)
    best = found[chosen[0]][0]
    return sorted(chosen, key=lambda position: (found[position][0] != best, *_place(found[position])))


def _overlap(one: tuple[int, Statement], other: tuple[int, Statement]) -> bool:
    return one[0] == other[0] and one[1].start < other[1].end and other[1].start < one[1].end


def _place(entry: tuple[int, Statement]) -> tuple[int, int]:
    return entry[0], entry[1].start


def quoted(statement: Statement, passage: Passage) -> str:
    """A statement as it stands in an answer: what is said of a named thing says its name."""
    named = _NAME.search(passage.headings[-1]) if passage.headings else None
    if named and named[1].removesuffix("()") not in statement.text:
        return f"`{named[1]}`: {statement.text}"
    return statement.text
