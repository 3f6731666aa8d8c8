"""ingest, ask and search, with what people see while they wait."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from services.cli.knowledge import Answer, Knowledge, batches, find_sources

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.cli.api import Api

_SENT_AHEAD = 2
"""Batches of documents that are with the service at once."""


_SHOWN = 200
"""Characters of a passage that people are shown."""


def ingest(api: Api, collection: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Ingest files and folders and wait until they can be found.

    Returns:
        Counts of documents and the failed ones with their reasons.

    Raises:
        PlexusError: Nothing to ingest, or the edge or the service refused.
    """
    sources = find_sources(paths)
    knowledge = Knowledge(api, collection)
    knowledge.ensure()
    failures: list[dict[str, Any]] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("ingesting", total=len(sources))
        finished = 0
        unsent = batches(sources)
        sent: deque[tuple[str, int]] = deque()
        while True:
            # The next batch is there before the one that is waited for ends, so that no worker idles.
            while len(sent) < _SENT_AHEAD and (batch := next(unsent, None)):
                sent.append((knowledge.ingest(batch), len(batch)))
            if not sent:
                break
            operation, size = sent.popleft()
            last: dict[str, Any] = {}
            for last in knowledge.watch(operation):
                bar.update(task, completed=finished + _count(last))
            failures.extend(last.get("failures", []))
            finished += size
            bar.update(task, completed=finished)
    return {"documents": len(sources), "failed": len(failures), "failures": failures}


def _count(operation: dict[str, Any]) -> int:
    return sum(int(operation[name]) for name in ("readyCount", "unchangedCount", "failedCount"))


def answer_as_json(question: str, answer: Answer) -> dict[str, Any]:
    """What `plexus ask --json` prints."""
    return {
        "question": question,
        "answer": answer.text,
        "sentences": answer.sentences,
        "citations": answer.citations,
    }


def citation_line(citation: dict[str, Any]) -> str:
    """One passage as a line: number, document, headings, place."""
    place = f"{citation.get('start', 0)}-{citation.get('end', 0)}"
    headings = " > ".join(citation.get("headings", []))
    uri = citation.get("uri", "?")
    return f"[{citation.get('number', '?')}] {uri}{f', {headings}' if headings else ''} ({place})"


def passage_lines(citation: dict[str, Any]) -> list[str]:
    """One passage for people: its line, and how it begins."""
    text = " ".join(str(citation.get("text", "")).split())
    begin = text if len(text) <= _SHOWN else f"{text[:_SHOWN].rsplit(' ', 1)[0]}…"
    return [citation_line(citation), f"    {begin}"]
