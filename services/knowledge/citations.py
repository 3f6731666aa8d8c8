"""Which passage supports which sentence: computed from vectors and words, never taken from the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEANING_WEIGHT = 0.7
"""Share of the cosine in the support; the rest is the share of the sentence's words found in the passage."""
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9`*-])|\n{2,}|\n(?=[-*] |\d+\. )")
_WORD = re.compile(r"[a-z0-9_]{3,}")
_STOP = frozenset(
    (
        "the",
        "and",
        "for",
        "are",
        "was",
        "were",
        "with",
        "that",
        "this",
        "from",
        "has",
        "have",
        "had",
        "not",
        "but",
        "its",
        "can",
        "may",
        "will",
        "you",
        "your",
        "they",
        "their",
        "which",
        "when",
        "what",
        "who",
        "how",
        "why",
        "where",
        "into",
        "than",
        "then",
        "also",
        "such",
        "each",
        "any",
        "all",
        "one",
        "two",
        "use",
        "used",
        "using",
        "does",
        "did",
        "get",
        "there",
        "much",
        "many",
        "happen",
        "happens",
    )
)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of an answer.

    Attributes:
        text: The sentence.
        supported: Whether a passage supports it.
        citation: Number of that passage, 0 without support.
        support: How well the best passage supports it, 0 to 1.
        start: First character, in the document's text, of the statement that supports it.
        end: The character after its last.
    """

    text: str
    supported: bool
    citation: int
    support: float
    start: int = 0
    end: int = 0


def sentences(text: str) -> list[str]:
    """Split a text into sentences; the end of a piece counts as the end of its last sentence."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


class SentenceStream:
    """Sentences of a text that arrives in pieces; the same as `sentences` of the whole."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, piece: str) -> list[str]:
        """Take a piece, return the sentences that are complete now."""
        self._text += piece
        complete: list[str] = []
        start = 0
        for match in SENTENCE_END.finditer(self._text):
            if match.end() == len(self._text):
                break  # what follows may still change where the sentence ends
            complete.append(self._text[start : match.start()].strip())
            start = match.end()
        self._text = self._text[start:]
        return [part for part in complete if part]

    def finish(self) -> list[str]:
        """The rest."""
        rest, self._text = self._text, ""
        return sentences(rest)


def words(text: str) -> frozenset[str]:
    """The words of a text that carry meaning, in lower case, without a plural s."""
    found = _WORD.findall(text.lower())
    return frozenset(word.removesuffix("s") for word in found if word not in _STOP)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The statements of the passages of an answer, ready to be compared with.

    Attributes:
        owners: Position of the passage that each statement is of.
        places: Its first character and the one after its last, in the document's text.
        vectors: float32, one unit vector a statement.
        words: Words of each passage.
    """

    owners: list[int]
    places: list[tuple[int, int]]
    vectors: NDArray[np.float32]
    words: list[frozenset[str]]


def cite(sentence: str, vector: NDArray[np.float32], evidence: Evidence, *, threshold: float) -> Sentence:
    """Find the passage that supports a sentence best.

    Args:
        sentence: The sentence.
        vector: Its unit vector.
        evidence: The passages.
        threshold: Support from which on it counts as supported.
    """
    if not evidence.owners:
        return Sentence(sentence, supported=False, citation=0, support=0.0)
    mine = words(sentence)
    shares = [len(mine & theirs) / len(mine) if mine else 0.0 for theirs in evidence.words]
    support = MEANING_WEIGHT * np.maximum(evidence.vectors @ vector, 0.0)
    support += (1 - MEANING_WEIGHT) * np.array([shares[owner] for owner in evidence.owners], np.float32)
    best = int(support.argmax())
    score = min(1.0, round(float(support[best]), 4))
    if score < threshold:
        return Sentence(sentence, supported=False, citation=0, support=score)
    start, end = evidence.places[best]
    return Sentence(sentence, True, evidence.owners[best] + 1, score, start, end)  # noqa: FBT003 - as named
