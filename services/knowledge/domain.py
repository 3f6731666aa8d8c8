"""Collections, documents and passages; no gRPC, no engine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from enum import StrEnum

from services.runtime.errors import InvalidArgumentError

MAX_CONTENT_BYTES = 10 * 1024 * 1024
MAX_DOCUMENTS = 100
MAX_URI = 1000
MAX_QUERY = 2000
_COLLECTION = re.compile(r"[a-z][a-z0-9-]{2,39}")


class State(StrEnum):
    """Where a document stands."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"


class Mode(StrEnum):
    """How passages are found."""

    DENSE = "dense"
    LEXICAL = "lexical"
    HYBRID = "hybrid"


class Style(StrEnum):
    """How an answer is made."""

    QUOTED = "quoted"
    WRITTEN = "written"


@dataclass(frozen=True, slots=True)
class ChunkingPolicy:
    """How text is cut, in characters."""

    target: int = 900
    overlap: int = 150

    def __post_init__(self) -> None:
        if not 200 <= self.target <= 4000:  # noqa: PLR2004 - stated in the proto
            raise InvalidArgumentError("must be 200 to 4000", field="collection.chunking.target_characters")
        if not 0 <= self.overlap <= self.target // 2:
            raise InvalidArgumentError(
                "must be 0 to half of the target", field="collection.chunking.overlap_characters"
            )


@dataclass(frozen=True, slots=True)
class Collection:
    """A set of documents; `created` is seconds since 1970."""

    name: str
    chunking: ChunkingPolicy = field(default_factory=ChunkingPolicy)
    created: float = 0.0
    documents: int = 0

    def __post_init__(self) -> None:
        if not _COLLECTION.fullmatch(self.name):
            raise InvalidArgumentError(
                "must be 3 to 40 lower-case letters, digits and hyphens, beginning with a letter",
                field="collection.name",
            )

    @property
    def engine_name(self) -> str:
        """Name of the collection's vectors and search index."""
        return f"knowledge-{self.name}"


@dataclass(frozen=True, slots=True)
class DocumentInput:
    """A document to ingest."""

    uri: str
    content: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Document:
    """What is known of a document; `sha256` is of the newest content, `version` of what is searchable."""

    id: str
    collection: str
    uri: str
    title: str
    content_type: str
    state: State
    error: str
    chunks: int
    sha256: str
    version: str
    updated: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that could not be ingested."""

    uri: str
    reason: str


@dataclass(frozen=True, slots=True)
class Operation:
    """The ingestion of some documents."""

    id: str
    collection: str
    total: int
    ready: int
    unchanged: int
    failed: int
    failures: list[Failure]
    created: float

    @property
    def done(self) -> bool:
        """Whether every document is ready or has failed."""
        return self.ready + self.unchanged + self.failed == self.total


@dataclass(frozen=True, slots=True)
class Task:
    """One document of an operation, as a message of the queue names it."""

    id: str
    operation: str
    collection: str
    document: str
    uri: str
    content_type: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text: `text == whole[start:end]`, and the headings above it."""

    number: int
    start: int
    end: int
    text: str
    headings: tuple[str, ...]

    def embedded(self, title: str) -> str:
        """What is embedded: a chunk is understood by its document's title and its headings too."""
        path = self.headings if self.headings[:1] == (title,) else (title, *self.headings)
        return "\n".join((" > ".join(path), self.text))


@dataclass(frozen=True, slots=True)
class Passage:
    """A found chunk; `number` is its rank from 1."""

    number: int
    document: str
    uri: str
    title: str
    headings: tuple[str, ...]
    chunk: int
    start: int
    end: int
    text: str
    score: float


def document_id(collection: str, uri: str) -> str:
    """The id of a document: the same URI is the same document."""
    return hashlib.sha256(f"{collection}\0{uri}".encode()).hexdigest()[:32]


def check_document(document: DocumentInput, position: int) -> None:
    """Apply the bounds of a document.

    Raises:
        InvalidArgumentError: It is over one.
    """
    if not 1 <= len(document.uri) <= MAX_URI:
        raise InvalidArgumentError(f"must be 1 to {MAX_URI} characters", field=f"documents[{position}].uri")
    if not 1 <= len(document.content) <= MAX_CONTENT_BYTES:
        raise InvalidArgumentError(
            f"must be 1 to {MAX_CONTENT_BYTES} bytes", field=f"documents[{position}].content"
        )


def check_query(text: str, name: str) -> str:
    """Return a valid query or question.

    Raises:
        InvalidArgumentError: It is empty or too long.
    """
    if not text.strip() or len(text) > MAX_QUERY:
        raise InvalidArgumentError(f"must be 1 to {MAX_QUERY} characters", field=name)
    return text
