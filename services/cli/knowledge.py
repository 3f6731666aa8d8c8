"""Documents and questions, over the REST API of the knowledge service."""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.runtime.errors import InvalidArgumentError, NotFoundError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from services.cli.api import Api

SUFFIXES = frozenset({".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx"})
"""Kinds of files taken from a folder; a file named itself is taken whatever its suffix."""
BATCH_BYTES = 4 * 1024 * 1024
"""Documents of one request; base64 and the server's message bound of 16 MiB leave room for one more."""
MAX_FILE_BYTES = 10 * 1024 * 1024
"""Largest file sent inline."""
_MARKDOWN = {".md": "text/markdown", ".markdown": "text/markdown"}


@dataclass(frozen=True, slots=True)
class Source:
    """A file to ingest and the URI that names its document."""

    path: Path
    uri: str
    size: int

    def content_type(self) -> str:
        """By suffix; plain text if it says nothing."""
        suffix = self.path.suffix.lower()
        return _MARKDOWN.get(suffix) or mimetypes.guess_type(self.path.name)[0] or "text/plain"


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Files to ingest, folders searched for known kinds.

    A document's URI is its path below the parent of the given path: `ingest docs` gives docs/a.md.

    Raises:
        NotFoundError: A path does not exist, or there is nothing to ingest.
        InvalidArgumentError: A file is too large.
    """
    sources: dict[str, Source] = {}
    for given in paths:
        root = given.resolve()
        if not root.exists():
            raise NotFoundError(f"{given} does not exist")
        files = [root] if root.is_file() else sorted(_files_below(root))
        for file in files:
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise InvalidArgumentError(
                    f"{file} has {size / 2**20:.0f} MiB, more than the {MAX_FILE_BYTES // 2**20} that a "
                    "document may have: split it"
                )
            uri = file.relative_to(root.parent).as_posix()
            sources[uri] = Source(file, uri, size)
    if not sources:
        kinds = ", ".join(sorted(SUFFIXES))
        raise NotFoundError(f"nothing to ingest there; known kinds: {kinds}")
    return list(sources.values())


def _files_below(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix.lower() in SUFFIXES:
            yield path


def batches(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Sources in groups that fit one request each."""
    batch: list[Source] = []
    size = 0
    for source in sources:
        if batch and size + source.size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(source)
        size += source.size
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer: sentences with their support, and the passages that they cite by number."""

    sentences: list[dict[str, Any]]
    citations: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The sentences with their citation numbers; `[?]` marks one without support."""
        return " ".join(f"{each.get('text', '').strip()} {_mark(each)}" for each in self.sentences)

    @property
    def uris(self) -> list[str]:
        """Documents that sentences cite, each once, in the order of their numbers."""
        cited = {number for each in self.sentences for number in _numbers(each)}
        kept = [each for each in self.citations if not cited or int(each.get("number", 0)) in cited]
        return list(dict.fromkeys(str(each.get("uri", "")) for each in kept))


def _numbers(sentence: dict[str, Any]) -> list[int]:
    number = int(sentence.get("citation", 0))
    return [number] if number else []


def _mark(sentence: dict[str, Any]) -> str:
    return "".join(f"[{number}]" for number in _numbers(sentence)) or "[?]"


class Knowledge:
    """One collection of documents. All names of the wire are in this class and in Answer."""

    def __init__(self, api: Api, collection: str) -> None:
        self._api = api
        self._collection = collection
        self._path = f"/v1/knowledge/collections/{collection}"

    def ensure(self) -> None:
        """Create the collection unless it exists."""
        try:
            self._api.call("POST", "/v1/knowledge/collections", {"name": self._collection})
        except PlexusError as error:
            if error.reason != "COLLECTION_EXISTS":
                raise

    def ingest(self, batch: Sequence[Source]) -> str:
        """Send documents; the id of the operation that ingests them."""
        documents = [
            {
                "uri": source.uri,
                "contentType": source.content_type(),
                "content": base64.b64encode(source.path.read_bytes()).decode(),
            }
            for source in batch
        ]
        # Repeating it after a lost answer is harmless: the same content is not ingested again.
        answer = self._api.call("POST", f"{self._path}/documents:ingest", {"documents": documents})
        return str(answer["id"])

    def watch(self, operation: str) -> Iterator[dict[str, Any]]:
        """The operation as it goes on, until it is done."""
        for event in self._api.events("GET", f"/v1/knowledge/operations/{operation}:watch"):
            yield event["operation"]

    def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """The best passages, best first."""
        answer = self._api.call("POST", f"{self._path}:search", {"query": query, "limit": limit})
        return list(answer.get("passages", []))

    def ask(
        self, question: str, *, generate: bool = True, on_sentence: Callable[[str], None] | None = None
    ) -> Answer:
        """Ask and wait for the whole answer.

        Args:
            question: In the user's words.
            generate: Let the chat model write; otherwise the best passages are the answer.
            on_sentence: Told each sentence, with its citation, as it comes.
        """
        answer: Answer | None = None
        body = {"question": question, "generate": generate}
        for event in self._api.events("POST", f"{self._path}:ask", body):
            if "sentence" in event and on_sentence is not None:
                on_sentence(f"{event['sentence'].get('text', '').strip()} {_mark(event['sentence'])}")
            if "answer" in event:
                answer = Answer(event["answer"]["sentences"], event["answer"]["citations"])
        if answer is None:
            # Over HTTP/1.1 a stream that failed on its way ends like a complete one.
            raise UnavailableError("the answer broke off before its end: ask again", reason="STREAM_BROKEN")
        return answer
