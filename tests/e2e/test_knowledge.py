"""Documents in, answers with citations out, over REST and through every service on the way."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BASE = "/v1/knowledge/collections"
MARKDOWN = "# Ferry\n\nThe ferry to Harris leaves Uig at nine.\n\n## Fares\n\nA bicycle travels for free.\n"
HTML = """<html><head><title>Lighthouse</title><script>var secret = 'tracking';</script></head>
<body><nav>Home</nav><main><h1>Lighthouse</h1>
<p>The lamp of Neist Point was lit in 1909.</p></main></body></html>
"""
TEXT = "The bakery in Portree closes at noon on Wednesdays."


def pdf(text: str) -> bytes:
    """A PDF of one page with one line."""
    stream = f"BT /F1 18 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources 6 0 R >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Font << /F1 5 0 R >> >>",
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


def docx(text: str) -> bytes:
    """A DOCX of one paragraph."""
    office = "http://schemas.openxmlformats.org"
    parts = {
        "[Content_Types].xml": (
            f'<Types xmlns="{office}/package/2006/content-types"><Default Extension="rels"'
            ' ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override'
            ' PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument'
            '.wordprocessingml.document.main+xml"/></Types>'
        ),
        "_rels/.rels": (
            f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" Type="{office}'
            '/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>'
        ),
        "word/document.xml": (
            f'<w:document xmlns:w="{office}/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>{text}</w:t>'
            "</w:r></w:p></w:body></w:document>"
        ),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + content)
    return file.getvalue()


DOCUMENTS = {
    "ferry.md": MARKDOWN.encode(),
    "lighthouse.html": HTML.encode(),
    "bakery.txt": TEXT.encode(),
    "bridge.pdf": pdf("The bridge to Skye opened in October 1995."),
    "whisky.docx": docx("Talisker distils at Carbost since 1830."),
}


class Collection:
    """One collection, over REST."""

    def __init__(self, client: httpx.Client, name: str) -> None:
        self.client = client
        self.path = f"{BASE}/{name}"
        made = client.post(BASE, json={"name": name})
        assert made.is_success, made.text

    def ingest(self, documents: dict[str, bytes]) -> dict[str, Any]:
        """Ingest and wait; the operation at its end."""
        inputs = [
            {"uri": uri, "content": base64.b64encode(content).decode()} for uri, content in documents.items()
        ]
        taken = self.client.post(f"{self.path}/documents:ingest", json={"documents": inputs})
        assert taken.is_success, taken.text
        return self._events("GET", f"/v1/knowledge/operations/{taken.json()['id']}:watch")[-1]["operation"]  # type: ignore[no-any-return]  # JSON

    def ask(self, question: str, **options: Any) -> list[dict[str, Any]]:
        return self._events("POST", f"{self.path}:ask", {"question": question, **options})

    def search(self, query: str, mode: str = "SEARCH_MODE_HYBRID") -> list[dict[str, Any]]:
        answer = self.client.post(f"{self.path}:search", json={"query": query, "mode": mode})
        assert answer.is_success, answer.text
        return list(answer.json()["passages"])

    def _events(self, method: str, path: str, body: Any = None) -> list[dict[str, Any]]:
        answer = self.client.request(method, path, json=body, timeout=240)
        assert answer.is_success, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[httpx.Client]:
    with backend.client() as client:
        yield client


@pytest.fixture(scope="module")
def island(client: httpx.Client) -> Collection:
    collection = Collection(client, "island")
    done = collection.ingest(DOCUMENTS)
    assert (done["readyCount"], done["failedCount"]) == (len(DOCUMENTS), 0), done
    return collection


@pytest.mark.parametrize("mode", ["SEARCH_MODE_DENSE", "SEARCH_MODE_LEXICAL", "SEARCH_MODE_HYBRID"])
@pytest.mark.parametrize(
    ("query", "uri"),
    [
        ("bicycle on the ferry", "ferry.md"),
        ("when was the lamp lit", "lighthouse.html"),
        ("bakery on Wednesdays", "bakery.txt"),
        ("bridge opened", "bridge.pdf"),
        ("where does Talisker distil", "whisky.docx"),
    ],
)
def test_each_kind_of_document_is_found_by_each_kind_of_search(
    island: Collection, mode: str, query: str, uri: str
) -> None:
    assert island.search(query, mode)[0]["uri"] == uri


def test_what_is_not_content_of_a_web_page_is_not_found(island: Collection) -> None:
    found = island.search("tracking secret Home", "SEARCH_MODE_LEXICAL")
    assert not any("tracking" in passage["text"] for passage in found)


def test_passages_alone_come_without_generation(island: Collection) -> None:
    passages, answer = island.ask("Does a bicycle cost anything?", generate=False, limit=2)
    assert [entry["number"] for entry in passages["passages"]["passages"]] == [1, 2]
    assert passages["passages"]["passages"][0]["uri"] == "ferry.md"
    assert answer["answer"]["sentences"] == []
    assert answer["answer"]["citations"] == passages["passages"]["passages"]


def test_each_sentence_carries_the_passage_that_supports_it_and_streaming_changes_no_number(
    island: Collection,
) -> None:
    first, *rest = island.ask("When does the ferry leave and what does a bicycle cost?")
    passages = {entry["number"]: entry for entry in first["passages"]["passages"]}
    streamed = [event["sentence"] for event in rest if "sentence" in event]
    answer = rest[-1]["answer"]
    assert streamed
    assert streamed == answer["sentences"]
    cited = {sentence["citation"] for sentence in streamed} - {0}
    assert cited, streamed
    assert {entry["number"] for entry in answer["citations"]} == cited
    for citation in answer["citations"]:
        assert citation == passages[citation["number"]]
    for sentence in streamed:
        assert sentence["supported"] == (sentence["citation"] != 0)
        assert 0 <= sentence["support"] <= 1
    assert passages[streamed[0]["citation"]]["uri"] == "ferry.md"


def test_a_question_that_the_documents_do_not_answer_cites_nothing_as_certain(island: Collection) -> None:
    *_, last = island.ask("What is the boiling point of tungsten in kelvin?")
    for sentence in last["answer"]["sentences"]:
        assert not sentence["supported"], sentence


def test_the_same_file_again_changes_nothing_and_a_changed_one_replaces_its_chunks(
    client: httpx.Client,
) -> None:
    collection = Collection(client, "timetable")
    collection.ingest({"a.md": b"# Bus\n\nThe bus leaves at seven.", "b.md": b"# Taxi\n\nCall Calum."})
    before = collection.search("bus leaves")
    again = collection.ingest({"a.md": b"# Bus\n\nThe bus leaves at seven."})
    assert (again["readyCount"], again["unchangedCount"]) == (0, 1)
    assert collection.search("bus leaves") == before
    changed = collection.ingest({"a.md": b"# Bus\n\nThe bus leaves at eight."})
    assert (changed["readyCount"], changed["unchangedCount"]) == (1, 0)

    def replaced() -> bool:
        texts = [passage["text"] for passage in collection.search("bus leaves")]
        assert not (any("seven" in text for text in texts) and any("eight" in text for text in texts))
        return any("eight" in text for text in texts) and not any("seven" in text for text in texts)

    eventually(replaced)
    document = client.get(f"{collection.path}/documents").json()["documents"][0]
    assert client.delete(f"{collection.path}/documents/{document['id']}").is_success
    eventually(partial(_gone, collection, document["uri"]))


def _gone(collection: Collection, uri: str) -> bool:
    return uri not in [passage["uri"] for passage in collection.search("bus leaves")]


def test_a_corrupt_pdf_ends_in_the_dead_letters_with_its_reason_and_the_rest_goes_on(
    client: httpx.Client,
) -> None:
    collection = Collection(client, "damaged")
    done = collection.ingest(
        {
            "broken.pdf": b"%PDF-1.4\nnot a pdf at all",
            "blank.md": b" \n",
            "good.md": b"# Good\n\nStill ingested.",
        }
    )
    assert (done["readyCount"], done["failedCount"]) == (1, 2)
    reasons = {failure["uri"]: failure["reason"] for failure in done["failures"]}
    assert set(reasons) == {"broken.pdf", "blank.md"}
    assert all(reasons.values())
    assert collection.search("good")[0]["uri"] == "good.md"

    def dead() -> bool:
        listed = client.get("/v1/subscriptions/knowledge-ingest/deadLetters", params={"page_size": 1000})
        texts = [letter["reason"] for letter in listed.json()["deadLetters"]]
        return all(f"{uri}: {reason}" in texts for uri, reason in reasons.items())

    eventually(dead)
