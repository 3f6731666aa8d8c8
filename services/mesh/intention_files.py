"""Intentions in a folder of YAML files, one destination a file, watched; for a mesh without Consul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from services.mesh.intentions import IntentionTable, ServiceIntentions
from services.mesh.policy.folder import FolderPolicyStore
from services.runtime import yaml_lines
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from services.mesh.policy.domain import Document

log = structlog.get_logger(__name__)

INTERVAL_S = 0.25


def parse(document: Document) -> ServiceIntentions:
    """Read one file.

    Raises:
        InvalidArgumentError: It is not a valid service-intentions entry; a problem a line, as
            `file:line: key: reason`.
    """
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


class IntentionDocuments:
    """Takes the files, keeps the last good content of each.

    Attributes:
        refusals: Why a file's present content is not in force, by its name.
    """

    def __init__(self) -> None:
        self._taken: dict[str, Document] = {}
        self._entries: dict[str, ServiceIntentions] = {}
        self.refusals: dict[str, str] = {}

    def entries(self) -> list[ServiceIntentions]:
        """What is in force."""
        return [entry for _, entry in sorted(self._entries.items())]

    def replace(self, documents: Mapping[str, Document]) -> bool:
        """Take over a whole folder; tell whether anything in force is another now.

        A file that is not valid, or that speaks for a destination of which another one does, changes nothing.
        """
        before = dict(self._entries)
        for name in self._taken.keys() - documents.keys():
            del self._taken[name]
            self._entries.pop(name, None)
            self.refusals.pop(name, None)
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
        return self._entries != before

    def _take(self, name: str, document: Document) -> None:
        entry = parse(document)
        for other, known in self._entries.items():
            if other != name and known.Name == entry.Name:
                raise _invalid(f"{document.origin}:1: {other}.yaml speaks for {entry.Name!r} already")
        self._entries[name] = entry


class IntentionFiles:
    """A folder that is read, and followed."""

    def __init__(self, folder: Path) -> None:
        """Name the folder.

        Args:
            folder: With a *.yaml for each destination.
        """
        self._store = FolderPolicyStore(folder, folder, interval_s=INTERVAL_S)

    async def read(self) -> list[ServiceIntentions]:
        """What the folder says now.

        Raises:
            InvalidArgumentError: A file is not valid; the text names file, line and reason of each problem.
        """
        return _all_good(IntentionDocuments(), await self._store.read())

    async def watch(self) -> AsyncIterator[IntentionTable]:
        """The rules now and after each change; a file at fault is logged, and what it said before stays.

        Raises:
            InvalidArgumentError: As `read`, at the first look alone.
        """
        taken: IntentionDocuments | None = None
        async for documents in self._store.watch():
            if taken is None:
                taken = IntentionDocuments()
                yield IntentionTable.of(_all_good(taken, documents))
            elif taken.replace(documents):
                yield IntentionTable.of(taken.entries())


def _all_good(taken: IntentionDocuments, documents: Mapping[str, Document]) -> list[ServiceIntentions]:
    taken.replace(documents)
    if taken.refusals:
        raise _invalid("\n".join(text for _, text in sorted(taken.refusals.items())))
    return taken.entries()
