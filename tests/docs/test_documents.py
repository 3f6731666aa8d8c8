"""The handbook's documents that are no Markdown: they say what their source says, and answers cite them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from services.knowledge.extraction import content_type_of, extract
from tests.docs.pages import HANDBOOK
from tools import documents

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.backend import Backend


WITHIN_S = 900
"""For 26 documents on a machine that does much else; seconds on one that does not."""


def text_of(path: Path) -> str:
    """The words of a document with single spaces."""
    return " ".join(extract(path.read_bytes(), content_type_of(path.name, "")).split())


def test_the_checklist_is_one_page_that_says_what_its_source_says() -> None:
    text = text_of(documents.CHECKLIST_FILE)
    for heading, items in documents.CHECKLIST.items():
        assert heading in text
        for item in items:
            assert item in text, "run `python -m tools.documents`"
    assert text.count("[ ]") == sum(map(len, documents.CHECKLIST.values()))
    assert re.findall(rb"/Count (\d+)", documents.CHECKLIST_FILE.read_bytes()) == [b"1"]


def test_the_questionnaire_says_what_its_source_says() -> None:
    text = text_of(documents.QUESTIONNAIRE_FILE)
    for question, answer in documents.QUESTIONNAIRE:
        assert question in text
        assert answer in text, "run `python -m tools.documents`"


@pytest.fixture(scope="module")
def ingested(backend: Backend) -> Backend:
    backend.plexus("ingest", str(HANDBOOK), "--collection", "handbook", within_s=WITHIN_S)
    return backend


def ask(backend: Backend, question: str, *options: str) -> Any:
    return json.loads(backend.plexus("ask", question, "--collection", "handbook", "--json", *options).stdout)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("question", "words", "file"),
    [
        ("Which port does the restore drill use?", "port 8009", "operations-checklist.pdf"),
        ("What is a poison document?", "every attempt to read it fail", "glossary.html"),
        ("How is a person's data erased?", "upper bound for an erasure", "security-questionnaire.docx"),
    ],
)
def test_what_stands_in_one_document_alone_is_answered_by_citing_it(
    ingested: Backend, question: str, words: str, file: str
) -> None:
    elsewhere = [page.name for page in HANDBOOK.glob("*.md") if words in " ".join(page.read_text().split())]
    assert elsewhere == []
    passages = ask(ingested, question, "--no-generate")["citations"]
    best = [passage["uri"] for passage in passages if words in " ".join(passage["text"].split())]
    assert best == [f"handbook/{file}"], [passage["uri"] for passage in passages]
    answer = ask(ingested, question)
    cited = {sentence["citation"] for sentence in answer["sentences"] if sentence["supported"]}
    uris = {passage["uri"] for passage in answer["citations"] if passage["number"] in cited}
    assert f"handbook/{file}" in uris, answer
    assert words in answer["answer"], answer
