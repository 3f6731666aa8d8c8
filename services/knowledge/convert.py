"""Between knowledge messages and the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from plexus.knowledge.v1 import knowledge_pb2
from services.knowledge.domain import ChunkingPolicy, Collection, Document, DocumentInput, Mode, State, Style
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.knowledge.citations import Sentence
    from services.knowledge.domain import Operation, Passage

_STATES = {
    State.PENDING: knowledge_pb2.DOCUMENT_STATE_PENDING,
    State.READY: knowledge_pb2.DOCUMENT_STATE_READY,
    State.FAILED: knowledge_pb2.DOCUMENT_STATE_FAILED,
}
_MODES = {
    knowledge_pb2.SEARCH_MODE_UNSPECIFIED: Mode.HYBRID,
    knowledge_pb2.SEARCH_MODE_DENSE: Mode.DENSE,
    knowledge_pb2.SEARCH_MODE_LEXICAL: Mode.LEXICAL,
    knowledge_pb2.SEARCH_MODE_HYBRID: Mode.HYBRID,
}


_STYLES = {
    knowledge_pb2.ANSWER_STYLE_UNSPECIFIED: None,
    knowledge_pb2.ANSWER_STYLE_QUOTED: Style.QUOTED,
    knowledge_pb2.ANSWER_STYLE_WRITTEN: Style.WRITTEN,
}


def _timestamp(value: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(value * 1e6))
    return timestamp


def mode_from(mode: knowledge_pb2.SearchMode.ValueType) -> Mode:
    """The domain's mode; hybrid if unspecified.

    Raises:
        InvalidArgumentError: There is no such mode.
    """
    if mode not in _MODES:
        raise InvalidArgumentError("unknown mode", field="mode")
    return _MODES[mode]


def style_from(style: knowledge_pb2.AnswerStyle.ValueType) -> Style | None:
    """The domain's style; None for the configured one.

    Raises:
        InvalidArgumentError: There is no such style.
    """
    if style not in _STYLES:
        raise InvalidArgumentError("unknown style", field="style")
    return _STYLES[style]


def collection_from(message: knowledge_pb2.Collection) -> Collection:
    """The domain's collection, with its defaults for what is absent."""
    default = ChunkingPolicy()
    target = message.chunking.target_characters or default.target
    overlap = message.chunking.overlap_characters or min(default.overlap, target // 2)
    return Collection(message.name, ChunkingPolicy(target, overlap))


def collection_to(collection: Collection) -> knowledge_pb2.Collection:
    """The proto's collection."""
    return knowledge_pb2.Collection(
        name=collection.name,
        chunking=knowledge_pb2.ChunkingPolicy(
            target_characters=collection.chunking.target, overlap_characters=collection.chunking.overlap
        ),
        create_time=_timestamp(collection.created),
        document_count=collection.documents,
    )


def input_from(message: knowledge_pb2.DocumentInput) -> DocumentInput:
    """The domain's document to ingest."""
    return DocumentInput(message.uri, message.content, message.content_type)


def document_to(document: Document) -> knowledge_pb2.Document:
    """The proto's document."""
    return knowledge_pb2.Document(
        id=document.id,
        uri=document.uri,
        title=document.title,
        content_type=document.content_type,
        state=_STATES[document.state],
        error=document.error,
        chunk_count=document.chunks,
        sha256=document.sha256,
        update_time=_timestamp(document.updated),
    )


def operation_to(operation: Operation) -> knowledge_pb2.Operation:
    """The proto's operation."""
    return knowledge_pb2.Operation(
        id=operation.id,
        collection=operation.collection,
        done=operation.done,
        total_count=operation.total,
        ready_count=operation.ready,
        unchanged_count=operation.unchanged,
        failed_count=operation.failed,
        failures=[
            knowledge_pb2.DocumentFailure(uri=failure.uri, reason=failure.reason)
            for failure in operation.failures
        ],
        create_time=_timestamp(operation.created),
    )


def passage_to(passage: Passage) -> knowledge_pb2.Passage:
    """The proto's passage."""
    return knowledge_pb2.Passage(
        number=passage.number,
        document=passage.document,
        uri=passage.uri,
        title=passage.title,
        headings=passage.headings,
        chunk=passage.chunk,
        start=passage.start,
        end=passage.end,
        text=passage.text,
        score=passage.score,
    )


def sentence_to(sentence: Sentence) -> knowledge_pb2.Sentence:
    """The proto's sentence."""
    return knowledge_pb2.Sentence(
        text=sentence.text,
        supported=sentence.supported,
        citation=sentence.citation,
        support=sentence.support,
        start=sentence.start,
        end=sentence.end,
    )
