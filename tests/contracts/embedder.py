"""What every Embedder does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from services.inference.domain import Embedder

TEXTS = ["The cat sits on the mat.", "A cat is sitting on a rug.", "Interest rates rose by half a percent."]


class EmbedderContract:
    """Subclasses give a fixture `embedder`."""

    async def test_vectors_have_unit_length_and_rank_by_meaning(self, embedder: Embedder) -> None:
        vectors = (await embedder.embed(TEXTS)).vectors
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3

    async def test_a_text_has_the_same_vector_in_any_company(self, embedder: Embedder) -> None:
        alone = (await embedder.embed(TEXTS[:1])).vectors[0]
        crowd = await asyncio.gather(
            *(embedder.embed([TEXTS[0], f"{'padding ' * number}{number}"]) for number in range(1, 60))
        )
        for answer in crowd:
            assert answer.vectors[0] @ alone > 0.995

    async def test_a_long_text_is_cut_and_told_so(self, embedder: Embedder) -> None:
        answer = await embedder.embed([TEXTS[0], "word " * 5000])
        assert answer.truncated == [1]
        assert answer.tokens[0] < answer.tokens[1]

    async def test_a_caller_that_leaves_does_not_stop_the_others(self, embedder: Embedder) -> None:
        gone = [asyncio.create_task(embedder.embed(["never mind"] * 20)) for _ in range(5)]
        kept = asyncio.create_task(embedder.embed(TEXTS))
        await asyncio.sleep(0)  # lets the calls queue
        for task in gone:
            task.cancel()
        assert (await asyncio.wait_for(kept, 60)).vectors.shape[0] == 3
