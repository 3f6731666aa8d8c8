"""Reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

K = 60
"""The paper's constant: how little the top ranks stand out."""

KeyT = TypeVar("KeyT", bound="Hashable")


def fuse(*rankings: Sequence[KeyT]) -> list[tuple[KeyT, float]]:
    """Fuse rankings, best first, by the sum of 1 / (K + rank); ties keep the order of first appearance."""
    scores: dict[KeyT, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            scores[key] = scores.get(key, 0.0) + 1.0 / (K + rank)
    return sorted(scores.items(), key=lambda entry: -entry[1])
