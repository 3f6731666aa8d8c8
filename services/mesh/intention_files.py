"""Intentions in folders of YAML files, one destination a file, watched; for a mesh without Consul."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from services.mesh.intention_store import Kept
from services.mesh.intentions import WILDCARD, IntentionTable, ServiceIntentions
from services.mesh.policy.domain import MAX_BYTES
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.registry.domain import is_service_name
from services.runtime import yaml_lines
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from services.mesh.policy.domain import Document

log = structlog.get_logger(__name__)

INTERVAL_S = 0.25
_NAME = re.compile(r"""^Name:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)


def parse(document: Document) -> ServiceIntentions:
    """Read one file.

    Raises:
        InvalidArgumentError: It is not a valid service-intentions entry; a problem a line, as
            `file:line: key: reason`.
    """
    if len(document.text) > MAX_BYTES:
        raise _invalid(f"{document.origin}:1: longer than {MAX_BYTES} bytes")
    try:
        data, lines = yaml_lines.load(document.text)
    except yaml_lines.YamlError as error:
        raise _invalid(f"{document.origin}:{error.line}: {error}") from error
    if not isinstance(data, dict):
        raise _invalid(f"{document.origin}:1: must be a mapping")
    try:
        entry = ServiceIntentions.model_validate(data)
    except ValidationError as error:
        raise _invalid("\n".join(yaml_lines.problems(document.origin, lines, error))) from error
    if entry.Name != WILDCARD and not is_service_name(entry.Name):
        raise _invalid(f"{document.origin}:{lines['Name',]}: Name: must be a service's name, or * for any")
    where = f"{document.origin}:{lines['Sources',]}"
    try:
        unjudged = IntentionTable.of([entry]).unjudged()
    except InvalidArgumentError as error:
        raise _invalid(f"{where}: {error.message}") from error
    if unjudged:
        raise _invalid(f"{where}: conditions on headers are not judged: {', '.join(unjudged)}")
    return entry


def _invalid(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(text, reason="INTENTIONS_INVALID")


def _spoken_for(document: Document) -> str:
    """Whom a text at fault is about; any, if it does not say."""
    found = _NAME.search(document.text)
    return found[1] if found else WILDCARD


class IntentionDocuments:
    """Takes the files, keeps the last good content of each.

    A file at fault at the first look has no such content: nobody knows what it allows and forbids, and other
    rules, such as those for any destination, could allow what it forbids. So its destination is closed until
    the file is mended. Later a file at fault changes nothing.

    Attributes:
        refusals: Why a file's present content is not in force, by its name.
    """

    def __init__(self) -> None:
        self._taken: dict[str, Document] = {}
        self._entries: dict[str, ServiceIntentions] = {}
        self._good: dict[str, Document] = {}
        self._unknown: set[str] | None = None
        self.refusals: dict[str, str] = {}

    def entries(self) -> list[ServiceIntentions]:
        """What is in force."""
        return [entry for _, entry in sorted(self._entries.items())]

    def table(self) -> IntentionTable:
        """What is in force, and who is closed because it is not known what should be."""
        closed: dict[str, str] = {}
        for name in sorted(self._unknown or ()):
            destination = _spoken_for(self._taken[name])
            closed[destination] = "\n".join(
                text for text in (closed.get(destination), self.refusals[name]) if text
            )
        return IntentionTable.of(self.entries(), closed=closed)

    def kept(self, *, removable: Callable[[Document], bool]) -> list[Kept]:
        """The texts in force, and why newer ones are not.

        Args:
            removable: Whether a file can be removed here.
        """
        return [
            Kept(
                destination=self._entries[name].Name if name in self._entries else _spoken_for(document),
                origin=document.origin,
                text=self._good[name].text if name in self._good else "",
                refusal=self.refusals.get(name, ""),
                removable=removable(document),
            )
            for name, document in sorted(self._taken.items())
        ]

    def name_for(self, destination: str) -> str:
        """The file that speaks for a destination, or a free name for one."""
        for name, entry in sorted(self._entries.items()):
            if entry.Name == destination:
                return name
        name = "any" if destination == WILDCARD else destination
        while name in self._entries:
            name += "_"
        return name

    def replace(self, documents: Mapping[str, Document]) -> bool:
        """Take over a whole folder; tell whether anything in force is another now.

        A file that is not valid, or that speaks for a destination of which another one does, changes nothing.
        """
        before = None if self._unknown is None else self.table()
        for name in self._taken.keys() - documents.keys():
            del self._taken[name]
            for kept in (self._entries, self._good, self.refusals):
                kept.pop(name, None)
        for name, document in sorted(documents.items()):
            if self._taken.get(name) == document and name not in self.refusals:
                continue
            self._taken[name] = document
            try:
                self._take(name, document)
            except InvalidArgumentError as error:
                if self.refusals.get(name) != error.message:
                    self.refusals[name] = error.message
                    log.error("intentions_refused", reason=error.message)  # noqa: TRY400 - the text says all
                continue
            self.refusals.pop(name, None)
        if self._unknown is None:
            self._unknown = set(self.refusals)
        self._unknown &= self.refusals.keys()
        return self.table() != before

    def _take(self, name: str, document: Document) -> None:
        entry = parse(document)
        for other, known in self._entries.items():
            if other != name and known.Name == entry.Name:
                raise _invalid(f"{document.origin}:1: {other}.yaml speaks for {entry.Name!r} already")
        self._entries[name] = entry
        self._good[name] = document


class IntentionFiles:
    """The user's folder, and over it what was written here; read, followed and written."""

    def __init__(self, folder: Path, written: Path | None = None) -> None:
        """Name the folders; they need not exist.

        Args:
            folder: With a *.yaml for each destination; read only.
            written: Where `write` puts files. A file here hides the one of the same name in `folder`.
        """
        self._written = written or folder
        self._store = FolderPolicyStore(folder, self._written, interval_s=INTERVAL_S)
        self._documents = IntentionDocuments()

    async def good(self) -> list[ServiceIntentions]:
        """What the folders say, as soon as no file is at fault."""
        documents = IntentionDocuments()
        async for found in self._store.watch():
            documents.replace(found)
            if not documents.refusals:
                break
        return documents.entries()

    def table(self) -> IntentionTable:
        """See IntentionStore."""
        return self._documents.table()

    def kept(self) -> list[Kept]:
        """See IntentionStore."""
        return self._documents.kept(removable=self._is_written)

    def _is_written(self, document: Document) -> bool:
        return document.origin.startswith(f"{self._written}/")

    async def watch(self) -> AsyncIterator[IntentionTable]:
        """See IntentionStore; a file at fault is logged, and what it said before stays.

        A file that was at fault from the start closes its destination until it is mended.
        """
        told: IntentionTable | None = None
        async for documents in self._store.watch():
            self._documents.replace(documents)
            if (table := self.table()) != told:
                told = table
                yield table

    async def write(self, documents: Mapping[str, Document], *, remove: frozenset[str] = frozenset()) -> None:
        """See IntentionStore."""
        texts = {self._documents.name_for(to): document.text for to, document in documents.items()}
        await self._store.write(texts, remove=frozenset(map(self._documents.name_for, remove)))
        # Not left to the watch: whoever changed a rule finds it changed.
        self._documents.replace(await self._store.read())
