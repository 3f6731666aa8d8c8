"""The embedded engines with the real models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from services.inference.backends.llama_cpp import LlamaCppChat
from services.inference.backends.onnx_minilm import OnnxEmbedder
from services.inference.models import ModelStore
from services.runtime.errors import FailedPreconditionError, ResourceExhaustedError
from tests.contracts.chat_model import QUESTION, ChatModelContract, answer
from tests.contracts.embedder import EmbedderContract
from tests.models import model_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def store() -> ModelStore:
    return ModelStore(model_folder())


def _embedder(store: ModelStore, *, queue: int = 8192) -> OnnxEmbedder:
    return OnnxEmbedder(
        lambda: (store.path("minilm", "model.onnx"), store.path("minilm", "tokenizer.json")),
        context_tokens=256,
        batch=32,
        queue=queue,
        threads=2,
    )


class TestOnnxEmbedder(EmbedderContract):
    @pytest.fixture
    async def embedder(self, store: ModelStore) -> AsyncIterator[OnnxEmbedder]:
        async with _embedder(store) as embedder:
            yield embedder


class TestLlamaCppChat(ChatModelContract):
    @pytest.fixture
    def model(self, store: ModelStore) -> Iterator[LlamaCppChat]:
        model = LlamaCppChat(
            lambda: store.path("smollm2", "model.gguf"), context_tokens=2048, queue=4, threads=2
        )
        yield model
        model.close()


async def test_a_full_queue_refuses_and_recovers(store: ModelStore) -> None:
    async with _embedder(store, queue=4) as embedder:
        with pytest.raises(ResourceExhaustedError):
            await embedder.embed(["x"] * 5)
        assert (await embedder.embed(["x"] * 4)).vectors.shape == (4, 384)


async def test_a_question_does_not_wait_for_a_pile_of_documents(store: ModelStore) -> None:
    async with _embedder(store) as embedder:
        piles = [
            asyncio.create_task(embedder.embed([f"a long document {number} " * 40] * 20, background=True))
            for number in range(10)
        ]
        await asyncio.sleep(0)  # the piles are there first
        assert (await embedder.embed(["a question"] * 60)).vectors.shape == (60, 384)
        assert sum(pile.done() for pile in piles) < 5
        assert all(vectors.vectors.shape == (20, 384) for vectors in await asyncio.gather(*piles))


async def test_a_pile_of_documents_is_not_kept_waiting_for_ever(store: ModelStore) -> None:
    async with _embedder(store) as embedder:
        document = asyncio.create_task(embedder.embed(["a document"], background=True))

        async def ask() -> None:
            while not document.done():
                await embedder.embed(["a question"] * 40)

        await asyncio.wait_for(asyncio.gather(ask(), ask(), ask(), document), 60)


async def test_a_missing_model_says_how_to_get_it(tmp_path: Path) -> None:
    empty = ModelStore(tmp_path)
    async with _embedder(empty) as embedder:
        with pytest.raises(FailedPreconditionError, match="plexus models pull minilm"):
            await embedder.embed(["x"])
    chat = LlamaCppChat(lambda: empty.path("smollm2", "model.gguf"), context_tokens=512, queue=1, threads=1)
    with pytest.raises(FailedPreconditionError, match="plexus models pull smollm2"):
        await answer(chat, QUESTION)
    chat.close()
