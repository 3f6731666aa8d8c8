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
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9`*-])|\n{2,}|\n(?=[-*] |\d+\. )")
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
    )
)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of an answer; `citation` is a passage's number, 0 without support."""

    text: str
    supported: bool
    citation: int
    support: float


def sentences(text: str) -> list[str]:
    """Split a text into sentences; the end of a piece counts as the end of its last sentence."""
    return [part.strip() for part in _END.split(text) if part.strip()]


class SentenceStream:
    """Sentences of a text that arrives in pieces; the same as `sentences` of the whole."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, piece: str) -> list[str]:
        """Take a piece, return the sentences that are complete now."""
        self._text += piece
        complete: list[str] = []
        start = 0
        for match in _END.finditer(self._text):
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
    """The passages of an answer, ready to be compared with.

    Attributes:
        owners: Position of the passage that each row of `vectors` is a sentence of.
        vectors: float32, one unit vector a row.
        words: Words of each passage.
    """

    owners: list[int]
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
    cosines = evidence.vectors @ vector
    mine = words(sentence)
    support = np.zeros(len(evidence.words), np.float32)
    for row, owner in enumerate(evidence.owners):
        support[owner] = max(support[owner], MEANING_WEIGHT * max(0.0, float(cosines[row])))
    for position, theirs in enumerate(evidence.words):
        share = len(mine & theirs) / len(mine) if mine else 0.0
        support[position] += (1 - MEANING_WEIGHT) * share
    best = int(support.argmax()) if len(support) else 0
    score = min(1.0, float(support[best])) if len(support) else 0.0
    supported = score >= threshold
    return Sentence(sentence, supported, best + 1 if supported else 0, round(score, 4))
