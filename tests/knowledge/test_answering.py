"""Answers with the real embedding model: quoted, written, and none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from services.inference.backends.onnx_minilm import OnnxEmbedder
from services.inference.models import ModelStore
from services.knowledge.answering import Answering
from services.knowledge.chunking import chunk, title_of
from services.knowledge.config import KnowledgeConfig
from services.knowledge.domain import ChunkingPolicy, Passage, Style
from services.knowledge.statements import Kind, statements
from tests.models import model_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from services.knowledge.citations import Sentence

TEXT = """# Storage

The storage service keeps objects in buckets. The buckets `artifacts` and
`uploads` exist from the start.

## A full disk

When the disk is full, writes are refused with RESOURCE_EXHAUSTED. Reading goes on.

| status | meaning |
|---|---|
| NOT_FOUND | there is no such object |

## classmethod store.open()

`store.open(path)`

Open a store on a folder of the file system. It is closed with:

```
store.close()
```

Its states are:

- open, when it is used;
- closed, when it is not.
"""


class Engines:
    """The embedder in this process, and a writer that says what it is told."""

    def __init__(self, embedder: OnnxEmbedder, said: Sequence[str] = ()) -> None:
        self._embedder = embedder
        self._said = said

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return (await self._embedder.embed(list(texts))).vectors

    async def chat(self, _system: str, _question: str, *, max_tokens: int) -> AsyncGenerator[str]:
        del max_tokens
        for piece in self._said:
            yield piece


@pytest.fixture
async def embedder() -> AsyncIterator[OnnxEmbedder]:
    store = ModelStore(model_folder())
    files = (store.path("minilm", "model.onnx"), store.path("minilm", "tokenizer.json"))
    async with OnnxEmbedder(lambda: files, context_tokens=256, batch=32, queue=8192, threads=2) as embedder:
        yield embedder


def _passages(text: str = TEXT) -> list[Passage]:
    title = title_of(text, "x")
    return [
        Passage(
            number=each.number + 1,
            document="d",
            uri="storage.md",
            title=title,
            headings=each.headings,
            chunk=each.number,
            start=each.start,
            end=each.end,
            text=each.text,
            score=1.0,
        )
        for each in chunk(text, ChunkingPolicy())
    ]


async def _answer(
    embedder: OnnxEmbedder, question: str, style: Style | None = None, said: Sequence[str] = ()
) -> list[Sentence]:
    nothing: Any = None
    engines: Any = Engines(embedder, said)
    answering = Answering(nothing, engines, KnowledgeConfig())
    return [sentence async for sentence in answering.answer(question, _passages(), style)]


async def test_an_answer_is_what_the_documents_say_and_where(embedder: OnnxEmbedder) -> None:
    (sentence, *_) = await _answer(embedder, "What happens to writes when the disk is full?")
    assert sentence.text == "When the disk is full, writes are refused with RESOURCE_EXHAUSTED."
    assert (sentence.supported, sentence.citation) == (True, 2)
    assert sentence.support > 0.95
    assert TEXT[sentence.start : sentence.end] == sentence.text


async def test_what_is_said_of_a_named_thing_says_its_name(embedder: OnnxEmbedder) -> None:
    (sentence, *_) = await _answer(embedder, "How do I open a store on a folder?")
    assert sentence.text == "`store.open()`: Open a store on a folder of the file system."


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize(
    "question", ["Who won the world cup in 1998?", "Can the storage service brew coffee or tea?"]
)
async def test_what_the_documents_do_not_tell_is_not_known(
    embedder: OnnxEmbedder, question: str, style: Style
) -> None:
    (sentence,) = await _answer(embedder, question, style, ["It was France."])
    assert sentence.text == "I don't know from these documents."
    assert (sentence.supported, sentence.citation, sentence.support) == (False, 0, 0.0)


async def test_a_written_answer_keeps_what_is_supported_and_quotes_for_what_is_not(
    embedder: OnnxEmbedder,
) -> None:
    said = [
        "The buckets artifacts and uploads ",
        "exist from the start. When a disk is full, the writes may be lost for ever by the service. ",
        "Bananas are yellow. Bananas are yellow. More.",
    ]
    answer = await _answer(embedder, "Which buckets exist from the start?", Style.WRITTEN, said)
    assert [(sentence.text, sentence.supported) for sentence in answer] == [
        ("The buckets artifacts and uploads exist from the start.", True),
        ("When the disk is full, writes are refused with RESOURCE_EXHAUSTED.", True),
        ("Bananas are yellow.", False),
    ]
    assert [sentence.citation for sentence in answer] == [1, 2, 0]


async def test_no_passages_no_answer(embedder: OnnxEmbedder) -> None:
    nothing: Any = None
    engines: Any = Engines(embedder)
    answering = Answering(nothing, engines, KnowledgeConfig())
    (sentence,) = [each async for each in answering.answer("Anything?", [])]
    assert not sentence.supported


def test_statements_are_sentences_items_and_rows_with_their_places() -> None:
    found = [(passage, each) for passage in _passages() for each in statements(passage.text)]
    assert [(each.text, each.kind) for _, each in found] == [
        ("The storage service keeps objects in buckets.", Kind.PROSE),
        ("The buckets `artifacts` and `uploads` exist from the start.", Kind.PROSE),
        ("When the disk is full, writes are refused with RESOURCE_EXHAUSTED.", Kind.PROSE),
        ("NOT_FOUND — there is no such object", Kind.ROW),
        ("Open a store on a folder of the file system.", Kind.PROSE),
        ("It is closed with: `store.close()`", Kind.PROSE),
        ("Its states are: open, when it is used; closed, when it is not.", Kind.PROSE),
        ("open, when it is used;", Kind.ITEM),
        ("closed, when it is not.", Kind.ITEM),
    ]
    for passage, each in found[:3]:
        assert " ".join(passage.text[each.start : each.end].split()) == each.text


def test_code_and_torn_beginnings_are_no_statements() -> None:
    assert [each.text for each in statements("of it is lost here. A whole one follows it.")] == [
        "A whole one follows it."
    ]
    assert statements("```\nfor the first time in here\n```\n\n>>> a = call(1, 2, 3)") == []
