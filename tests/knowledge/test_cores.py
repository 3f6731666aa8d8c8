"""The pure parts: chunking, fusion, citations, extraction."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from services.knowledge.chunking import chunk, title_of
from services.knowledge.citations import Evidence, SentenceStream, cite, sentences, words
from services.knowledge.domain import ChunkingPolicy
from services.knowledge.extraction import ExtractionError, content_type_of, extract
from services.knowledge.fusion import fuse
from services.runtime.errors import InvalidArgumentError

TEXT = (
    """# Title

First paragraph. It has two sentences.

## Section one

Some text here.

```python
# not a heading

x = 1
```

### Deep

- item one
- item two

## Section two

"""
    + "A rather long sentence that goes on and on. " * 60
)


@pytest.mark.parametrize("policy", [ChunkingPolicy(), ChunkingPolicy(200, 0), ChunkingPolicy(300, 150)])
def test_offsets_are_exact_and_no_word_is_lost(policy: ChunkingPolicy) -> None:
    chunks = chunk(TEXT, policy)
    covered: set[int] = set()
    for entry in chunks:
        assert TEXT[entry.start : entry.end] == entry.text
        assert entry.text == entry.text.strip()
        assert len(entry.text) <= policy.target + policy.overlap
        covered.update(range(entry.start, entry.end))
    headings = {
        position
        for line in ("# Title", "## Section one", "### Deep", "## Section two")
        for position in range(TEXT.index(line), TEXT.index(line) + len(line))
    }
    missing = "".join(TEXT[position] for position in range(len(TEXT)) if position not in covered | headings)
    assert missing.strip() == ""
    assert [entry.number for entry in chunks] == list(range(len(chunks)))


def test_headings_above_a_chunk_follow_the_structure() -> None:
    by_text = {entry.text.split("\n", 1)[0]: entry.headings for entry in chunk(TEXT, ChunkingPolicy())}
    assert by_text["First paragraph. It has two sentences."] == ("Title",)
    assert by_text["Some text here."] == ("Title", "Section one")
    assert by_text["- item one"] == ("Title", "Section one", "Deep")


def test_a_long_section_overlaps_itself_and_nothing_else() -> None:
    chunks = [entry for entry in chunk(TEXT, ChunkingPolicy(300, 100)) if "Section two" in entry.headings]
    assert len(chunks) > 3
    assert all(later.start < earlier.end for earlier, later in pairwise(chunks))
    without = chunk(TEXT, ChunkingPolicy(300, 0))
    assert all(later.start >= earlier.end for earlier, later in pairwise(without))


def test_any_text_is_cut_with_exact_offsets() -> None:
    generator = random.Random(7)
    for _ in range(200):
        text = "".join(generator.choices("ab. \n#`-é", k=generator.randint(0, 900)))
        for entry in chunk(text, ChunkingPolicy(200, 50)):
            assert text[entry.start : entry.end] == entry.text
            assert entry.start < entry.end


def test_the_title_is_the_first_heading() -> None:
    assert title_of("text\n\n## A *title*\n", "x.md") == "A title"
    assert (
        title_of("# `json.dump()` \\*args, a_b, 2 * 3 * 4\n", "x.md") == "json.dump() *args, a_b, 2 * 3 * 4"
    )
    assert title_of("no heading", "x.md") == "x.md"


def test_fusion_prefers_what_both_rankings_like() -> None:
    fused = [key for key, _ in fuse(["a", "b", "c"], ["b", "d", "a"])]
    assert fused[0] == "b"
    assert set(fused) == {"a", "b", "c", "d"}
    assert [key for key, _ in fuse(["x", "y"])] == ["x", "y"]


ANSWER = 'It works. See e.g. the docs! "Quoted." Then (so) 3.5 more.\n\nNew paragraph\n- a list\n- of items'


def test_sentences_of_a_stream_are_those_of_the_whole_however_it_is_cut() -> None:
    generator = random.Random(3)
    whole = sentences(ANSWER)
    assert whole[0] == "It works."
    for _ in range(100):
        stream, got, rest = SentenceStream(), [], ANSWER
        while rest:
            size = generator.randint(1, 7)
            got += stream.feed(rest[:size])
            rest = rest[size:]
        assert got + stream.finish() == whole


def _evidence(*passages: str, vectors: list[list[float]]) -> Evidence:
    return Evidence(
        owners=list(range(len(passages))),
        places=[(10 * number, 10 * number + 5) for number in range(len(passages))],
        vectors=np.array(vectors, np.float32),
        words=[words(text) for text in passages],
    )


def test_a_sentence_cites_the_passage_that_supports_it_best() -> None:
    evidence = _evidence("cats sleep long", "rates rise fast", vectors=[[1, 0], [0, 1]])
    cited = cite("Rates rise.", np.array([0.1, 0.99], np.float32), evidence, threshold=0.5)
    assert (cited.citation, cited.supported) == (2, True)
    assert (cited.start, cited.end) == (10, 15)
    assert cited.support == pytest.approx(0.7 * 0.99 + 0.3, abs=0.01)


def test_a_sentence_without_support_says_so() -> None:
    evidence = _evidence("cats sleep long", vectors=[[1, 0]])
    cited = cite("Rates rise.", np.array([0.1, 0.99], np.float32), evidence, threshold=0.5)
    assert (cited.citation, cited.supported) == (0, False)


def test_html_becomes_text_with_headings_and_without_link_targets() -> None:
    html = (
        b"<html><head><title>T</title></head><body><nav>menu</nav><h1>Head<a href='#h'>\xc2\xb6</a></h1>"
        b"<p>One <a href='x.html#y'>link</a>.</p><h2>Sub</h2><pre>code</pre></body></html>"
    )
    text = extract(html, "text/html")
    assert "# Head" in text
    assert "One link." in text
    assert "x.html" not in text


API = (
    """<html><head><title>T</title></head><body><header>Site</header><div role="navigation">menu
</div><div role="main"><header><h1>Module</h1></header><p>Intro.</p><h2>Functions</h2><dl>
<dt id="m.a">m.a</dt><dd>First.</dd><dt id="m.copy">
m.copy(<em>src</em>, dst)<a href="#m.copy">¶</a></dt><dd><p>Copies. """
    + "It takes a while. " * 20
    + """</p></dd><dt id="m.x">m.x</dt><dd>Short.</dd></dl><ul>"""
    + "".join(f"<li><a href='{number}.html'>Chapter number {number}</a></li>" for number in range(30))
    + "</ul></div><footer>Copyright</footer></body></html>"
)


def test_of_a_page_only_the_main_part_is_read() -> None:
    text = extract(API.encode(), "text/html")
    assert text.lstrip().startswith("# Module")
    assert "Intro." in text
    assert not any(furniture in text for furniture in ("Site", "menu", "Copyright", "Chapter number"))


def test_a_long_definition_of_a_page_is_a_section_named_after_its_term() -> None:
    chunks = {
        entry.headings: entry.text for entry in chunk(extract(API.encode(), "text/html"), ChunkingPolicy())
    }
    text = chunks["Module", "Functions", "m.copy()"]
    assert text.startswith("`m.copy(src, dst)`")
    assert "First." in chunks["Module", "Functions"]
    # What follows a section beside it is not a part of it.
    assert chunks["Module", "Functions", "m.x"].endswith("Short.")


def test_a_page_without_a_marked_main_part_loses_only_its_furniture() -> None:
    page = "<body><header><h1>Titel</h1></header><aside>ad</aside><p>Übersicht</p><footer>end</footer>"
    text = extract(page.encode(), "text/html")
    assert "# Titel" in text
    assert "Übersicht" in text
    assert "ad" not in text.split()
    assert "end" not in text
    assert "Übersicht" in extract(f"<meta charset=iso-8859-1>{page}".encode("latin-1"), "text/html")


def test_a_page_of_links_has_no_chunks_and_is_no_error() -> None:
    links = "".join(f"<li><a href='{number}'>Entry number {number}</a></li>" for number in range(50))
    text = extract(f"<body><h1>Index</h1><ul>{links}</ul></body>".encode(), "text/html")
    assert chunk(text, ChunkingPolicy()) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "text/html"),
        (b"%PDF-1.4 nonsense", "application/pdf"),
        (b"\xff\xfe\x00bad", "text/plain"),
        (b"  \n ", "text/markdown"),
        (b"PK not a zip", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
    ],
)
def test_a_damaged_or_empty_document_is_an_extraction_error(content: bytes, kind: str) -> None:
    with pytest.raises(ExtractionError):
        extract(content, kind)


def test_the_type_is_as_given_or_by_ending() -> None:
    assert content_type_of("a/b.MD", "") == "text/markdown"
    assert content_type_of("a.html", "") == "text/html"
    assert content_type_of("noending", "") == "text/plain"
    assert content_type_of("x", "text/html; charset=utf-8") == "text/html"
    with pytest.raises(InvalidArgumentError):
        content_type_of("a.exe", "")
