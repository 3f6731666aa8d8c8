"""Documents on disk, and the API's answers as the command shows them."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest

from services.cli.api import Api
from services.cli.content import passage_lines
from services.cli.knowledge import BATCH_BYTES, MAX_FILE_BYTES, Knowledge, batches, find_sources
from services.runtime.errors import InvalidArgumentError, NotFoundError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def edge(status: int, body: str, content_type: str = "application/json") -> Iterator[Api]:
    """An HTTP server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Api(f"http://127.0.0.1:{server.server_port}", "token") as api:
            yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_folder_gives_known_kinds_by_their_path_below_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    for name in ("a.md", "sub/b.PDF", "c.png", ".hidden/d.md", "e.docx"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    sources = find_sources([folder])
    assert [source.uri for source in sources] == ["docs/a.md", "docs/e.docx", "docs/sub/b.PDF"]
    assert [source.content_type() for source in sources][0::2] == ["text/markdown", "application/pdf"]


def test_a_file_named_itself_is_taken_whatever_its_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("x")
    (source,) = find_sources([tmp_path / "notes.log"])
    assert source.uri == "notes.log"


def test_nothing_to_ingest_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        find_sources([tmp_path / "absent"])
    with pytest.raises(NotFoundError, match=r"\.pdf"):
        find_sources([tmp_path])


def test_a_file_too_large_for_a_request_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidArgumentError, match=r"huge\.txt"):
        find_sources([tmp_path])


def test_requests_stay_within_the_message_bound_and_lose_no_file(tmp_path: Path) -> None:
    for number in range(5):
        with (tmp_path / f"{number}.txt").open("wb") as file:
            file.truncate(BATCH_BYTES // 2)
    sources = find_sources([tmp_path])
    groups = list(batches(sources))
    assert [source for group in groups for source in group] == sources
    assert all(sum(source.size for source in group) <= BATCH_BYTES for group in groups)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "plexus token"), (403, "kong.yml"), (503, "plexus status")]
)
def test_a_refusal_is_one_line_with_the_services_words_and_a_remedy(status: int, remedy: str) -> None:
    problem = {"code": 7, "message": "not allowed", "details": [{"reason": "WHY"}]}
    with (
        edge(status, json.dumps(problem)) as api,
        pytest.raises(PlexusError, match=f"not allowed.*{remedy}") as caught,
    ):
        api.call("POST", "/x", {})
    assert caught.value.reason == "WHY"
    assert "\n" not in caught.value.message


def test_a_refusal_that_is_not_json_is_still_one_error() -> None:
    with edge(502, "<html>bad gateway</html>", "text/html") as api, pytest.raises(PlexusError, match="502"):
        api.call("POST", "/x", {})


def test_nobody_at_the_address_is_an_error_with_a_remedy() -> None:
    with Api("http://127.0.0.1:1", "token") as api, pytest.raises(UnavailableError, match="plexus doctor"):
        api.call("POST", "/x", {})


def test_an_answer_keeps_citations_and_marks_a_sentence_without_support() -> None:
    events = [
        {"sentence": {"text": "So it is.", "citation": 2}},
        {"sentence": {"text": "Perhaps."}},
        {
            "answer": {
                "sentences": [{"text": "So it is.", "citation": 2}, {"text": "Perhaps."}],
                "citations": [{"number": 1, "uri": "a.md"}, {"number": 2, "uri": "b.md"}],
            }
        },
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    told: list[str] = []
    with edge(200, body, "text/event-stream") as api:
        answer = Knowledge(api, "docs").ask("why?", on_sentence=told.append)
    assert told == ["So it is. [2]", "Perhaps. [?]"]
    assert answer.text == "So it is. [2] Perhaps. [?]"
    assert answer.uris == ["b.md"]


def test_an_answer_that_ends_early_is_an_error() -> None:
    body = 'data: {"sentence": {"text": "So"}}\n\n'
    with edge(200, body, "text/event-stream") as api, pytest.raises(PlexusError, match="before its end"):
        Knowledge(api, "docs").ask("why?")


def test_an_error_in_the_middle_of_a_stream_is_an_error_not_an_end() -> None:
    body = 'data: {"sentence": {"text": "So"}}\n\ndata: {"error": {"code": 14, "message": "model away"}}\n\n'
    with edge(200, body, "text/event-stream") as api, pytest.raises(PlexusError, match="model away"):
        Knowledge(api, "docs").ask("why?")


def test_a_refused_field_is_named() -> None:
    violation = {"field": "question", "description": "must be 1 to 2000 characters"}
    body = {"message": "must be 1 to 2000 characters", "details": [{"fieldViolations": [violation]}]}
    with edge(400, json.dumps(body)) as api, pytest.raises(PlexusError, match="question: must be 1 to 2000"):
        api.call("POST", "/v1/anything", {})


def test_a_missing_collection_says_how_to_make_one() -> None:
    body = {"message": "no collection 'x'", "details": [{"reason": "COLLECTION_NOT_FOUND"}]}
    with edge(404, json.dumps(body)) as api, pytest.raises(PlexusError, match="plexus ingest"):
        api.call("POST", "/v1/anything", {})


def test_a_passage_shows_where_it_stands_and_how_it_begins() -> None:
    passage = {"number": 2, "uri": "a.md", "headings": ["Tea", "Green"], "start": 7, "end": 900}
    heading, text = passage_lines(passage | {"text": "words \n" * 100})
    assert heading == "[2] a.md, Tea > Green (7-900)"
    assert text.startswith("    words words ")
    assert text.endswith("words…")
    assert len(text) < 220
