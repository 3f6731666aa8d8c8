"""Finding passages and answering from them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from services.knowledge.citations import Evidence, Sentence, SentenceStream, cite, words
from services.knowledge.domain import Mode, Passage, Style
from services.knowledge.fusion import fuse
from services.knowledge.quoting import choose, quoted
from services.knowledge.statements import statements

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.knowledge.config import KnowledgeConfig
    from services.knowledge.domain import Collection
    from services.knowledge.engines import Engines, Found
    from services.knowledge.store import KnowledgeStore

_CANDIDATES = 40
"""Chunks taken from each engine before fusion."""
_PROMPT_PASSAGES = 3
"""Passages given to the model: small ones lose the thread in more."""
_PROMPT_CHARACTERS = 1200
_UNKNOWN = "I don't know from these documents."
_MEANS_THAT = 0.5
"""Cosine from which an unsupported sentence stands for a statement of the documents."""
_INSTRUCTION = (
    "Answer the question in one to three short sentences, using only the passages below. "
    "If they do not answer it, say so.\n\n"
)


class Answering:
    """Search and Ask over the engines."""

    def __init__(self, store: KnowledgeStore, engines: Engines, config: KnowledgeConfig) -> None:
        self._store = store
        self._engines = engines
        self._config = config

    async def search(self, collection: Collection, query: str, mode: Mode, *, limit: int) -> list[Passage]:
        """Passages for a query, best first, numbered from 1."""
        name = collection.engine_name
        wanted = max(_CANDIDATES, 2 * limit)

        async def dense() -> list[Found]:
            if mode is Mode.LEXICAL:
                return []
            (vector,) = await self._engines.embed([query])
            return await self._engines.dense(name, vector, limit=wanted)

        async def lexical() -> list[Found]:
            return [] if mode is Mode.DENSE else await self._engines.lexical(name, query, limit=wanted)

        rankings = await asyncio.gather(dense(), lexical())
        found = {(entry.document, entry.chunk, entry.version): entry for part in rankings for entry in part}
        if mode is Mode.HYBRID:
            order = fuse(*([_key(entry) for entry in part] for part in rankings))
        else:
            order = [(_key(entry), entry.score) for part in rankings for entry in part]
        documents = await self._store.versions(list({entry.document for entry in found.values()}))
        passages: list[Passage] = []
        for key, score in order:
            entry = found[key]
            document = documents.get(entry.document)
            if document is None or document.version != entry.version:
                continue  # of a version that is not yet, or no longer, the searchable one
            passages.append(
                Passage(
                    number=len(passages) + 1,
                    document=document.id,
                    uri=document.uri,
                    title=document.title,
                    headings=entry.headings,
                    chunk=entry.chunk,
                    start=entry.start,
                    end=entry.end,
                    text=entry.text,
                    score=score,
                )
            )
            if len(passages) == limit:
                break
        return passages

    async def answer(
        self, question: str, passages: Sequence[Passage], style: Style | None = None
    ) -> AsyncIterator[Sentence]:
        """The sentences of an answer, each with its support; one that says so if nothing answers it.

        Args:
            question: The question.
            passages: What to answer from, best first.
            style: Quoted from the passages, or written by the chat model; None for the configured one.
        """
        found = [(owner, each) for owner, passage in enumerate(passages) for each in statements(passage.text)]
        headings = [" > ".join((*passage.headings,)) or passage.title for passage in passages]
        texts = [question, *headings, *(statement.text for _, statement in found)]
        vector, *_ = vectors = await self._engines.embed(texts)
        above, vectors = vectors[1 : 1 + len(headings)], vectors[1 + len(headings) :]
        chosen = choose(question, vector, passages, found, vectors, above)
        if not chosen:
            yield Sentence(_UNKNOWN, supported=False, citation=0, support=0.0)
            return
        evidence = Evidence(
            owners=[owner for owner, _ in found],
            places=[
                (passages[owner].start + each.start, passages[owner].start + each.end)
                for owner, each in found
            ],
            vectors=vectors,
            words=[words(" ".join((*passage.headings, passage.text))) for passage in passages],
        )

        def quote(position: int) -> Sentence:
            owner, statement = found[position]
            text = quoted(statement, passages[owner])
            return cite(text, vectors[position], evidence, threshold=self._config.support_threshold)

        if (style or self._config.answer_style) is Style.QUOTED:
            for position in chosen:
                yield quote(position)
            return
        said: set[int] = set()
        async for sentence in self._written(question, passages):
            (vector,) = await self._engines.embed([sentence])
            own = cite(sentence, vector, evidence, threshold=self._config.support_threshold)
            nearest = int((vectors @ vector).argmax())
            if own.supported or float(vectors[nearest] @ vector) < _MEANS_THAT:
                yield own
            elif nearest not in said:
                said.add(nearest)
                yield quote(nearest)  # what the model meant, in the documents' words

    async def _written(self, question: str, passages: Sequence[Passage]) -> AsyncIterator[str]:
        """The chat model's sentences, up to the first that it repeats."""
        prompt = _INSTRUCTION + "\n\n".join(
            f"{' > '.join((passage.title, *passage.headings[1:]))}:\n{passage.text[:_PROMPT_CHARACTERS]}"
            for passage in passages[:_PROMPT_PASSAGES]
        )
        stream = SentenceStream()
        said: set[str] = set()
        pieces = self._engines.chat(prompt, question, max_tokens=self._config.answer_tokens)
        async with aclosing(pieces):
            async for piece in pieces:
                for sentence in stream.feed(piece):
                    if sentence in said:
                        return  # small models fall into loops; the first repetition is the end of the answer
                    said.add(sentence)
                    yield sentence
        for sentence in stream.finish():
            if sentence not in said:
                yield sentence


def _key(entry: Found) -> tuple[str, int, str]:
    return (entry.document, entry.chunk, entry.version)


def cited(passages: Sequence[Passage], answer: Sequence[Sentence]) -> list[Passage]:
    """The passages that a sentence of the answer cites, in order of their numbers."""
    numbers = {sentence.citation for sentence in answer}
    return [passage for passage in passages if passage.number in numbers]
