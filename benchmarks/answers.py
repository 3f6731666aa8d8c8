"""Answers: the HTML of Debian's python3-doc, ingested through the running backend, asked what it surely says.

Every page goes the way of a user's document: REST with a token through the edge, stored, queued, extracted,
cut, embedded, indexed. The embedder alone works on a sample of the same chunks, half before and half after,
so that whatever else the machine does falls on both. Then each question is asked; it is a hit if a page
known to answer it is among the first three citations.

The last line is one JSON object: {"hit_at_3": …, "pipeline_ratio": …, "pages_per_s": …, "chunks_per_s": …};
pipeline_ratio is chunks per second of the whole pipeline over those of the embedder alone. Bars: 0.8 and 0.5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from plexus.client.channel import Mesh
from plexus.inference.v1 import inference_pb2, inference_pb2_grpc
from services.cli.api import Api
from services.cli.knowledge import Knowledge, Source, batches
from services.gateway.credentials import CredentialStore
from services.knowledge.chunking import chunk, title_of
from services.knowledge.domain import ChunkingPolicy
from services.knowledge.extraction import extract
from services.runtime.service import join_mesh
from tests.models import model_folder
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BAR_HIT = 0.8
BAR_RATIO = 0.5
CITATIONS = 3
PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]
EMBED_CALL = 16
EMBED_CALLS = 4

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("How do I copy a whole directory tree?", ("library/shutil",)),
    ("How do I add subcommands to a command line parser?", ("library/argparse",)),
    ("How can I cache the results of a function so that it is not computed twice?", ("library/functools",)),
    ("How do I convert a Python object to a JSON string?", ("library/json",)),
    ("How do I run an external program and capture its output?", ("library/subprocess",)),
    ("Which function gives the median of a list of numbers?", ("library/statistics",)),
    ("How do I make a temporary file that is deleted when it is closed?", ("library/tempfile",)),
    ("How do I generate a secure random token for a password reset link?", ("library/secrets",)),
    ("How do I count how often each element occurs in a list?", ("library/collections",)),
    (
        "How do I find all matches of a regular expression in a string?",
        ("library/re", "howto/regex"),
    ),
    ("How do I read the rows of a CSV file as dictionaries?", ("library/csv",)),
    ("How do I use placeholders for values in an SQL query on SQLite?", ("library/sqlite3",)),
    ("How does an extension module in C release the global interpreter lock?", ("c-api/init",)),
    (
        "How do I chain an exception to the one that caused it with raise from?",
        ("reference/simple_stmts", "tutorial/errors", "library/exceptions"),
    ),
    ("How do I limit the time that is spent waiting on an awaitable?", ("library/asyncio-task",)),
    ("How do I submit calls to a pool of worker processes as futures?", ("library/concurrent.futures",)),
    ("How do I compute the SHA-256 digest of some bytes?", ("library/hashlib",)),
    ("How do I compute the difference between two dates?", ("library/datetime",)),
    ("How do I get a Path object for the user's home directory?", ("library/pathlib",)),
    ("How do I create a virtual environment?", ("library/venv", "tutorial/venv")),
    ("What is new in tracebacks in Python 3.11?", ("whatsnew/3.11",)),
    ("How do I walk through all folders below a directory?", ("library/os",)),
    ("How do I send an e-mail through an SMTP server?", ("library/smtplib", "library/email.examples")),
    (
        "How do I rotate a log file when it reaches a certain size?",
        ("library/logging.handlers", "howto/logging-cookbook", "howto/logging"),
    ),
    ("How do I read a file that is compressed with gzip?", ("library/gzip",)),
    ("How do I give the members of an enumeration automatic values?", ("library/enum", "howto/enum")),
    (
        "How does the match statement compare a value with patterns?",
        ("reference/compound_stmts", "tutorial/controlflow", "whatsnew/3.10"),
    ),
    ("How do I measure the execution time of a small code snippet?", ("library/timeit",)),
    ("How do I find out in which functions a program spends its time?", ("library/profile",)),
    ("How do I declare a method abstract so that subclasses must implement it?", ("library/abc",)),
    ("How do I insert into a list that is sorted and keep it sorted?", ("library/bisect",)),
    ("How do I get the n largest elements with a heap?", ("library/heapq",)),
    (
        "How do I replace an object with a mock during a unit test?",
        ("library/unittest.mock", "library/unittest.mock-examples"),
    ),
    ("How do I call a function of a shared C library?", ("library/ctypes",)),
    ("What is the difference between a list and a tuple?", ("faq/design", "library/stdtypes")),
    ("How do I reverse a string?", ("library/stdtypes", "library/functions", "faq/programming")),
)


# The documents.


def find_docs(given: Path | None) -> Path:
    """The folder of pages: as given, as installed, or unpacked once into the user's cache."""
    if given is not None:
        return given
    installed = sorted(Path("/usr/share/doc").glob("python3.*/html"))
    if installed and (installed[-1] / "library").is_dir():
        return installed[-1]
    cache = platformdirs.user_cache_path("plexus") / "python3-doc"
    unpacked = sorted(cache.glob("usr/share/doc/python3.*/html"))
    if not unpacked:
        cache.mkdir(parents=True, exist_ok=True)
        print("fetching Debian's python3-doc", file=sys.stderr)
        try:
            said = subprocess.run(
                ["apt-cache", "depends", "python3-doc"],  # noqa: S607 - Debian's own
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            name = next(
                word for word in said.split() if word.startswith("python3.") and word.endswith("-doc")
            )
            subprocess.run(["apt-get", "download", "-qq", name], cwd=cache, check=True)  # noqa: S603, S607
            (package,) = cache.glob("*.deb")
            subprocess.run(["dpkg", "-x", package, cache], check=True)  # noqa: S603, S607
            package.unlink()
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            sys.exit(f"no python3-doc here ({error}): install it, or name a folder of it with --docs")
        unpacked = sorted(cache.glob("usr/share/doc/python3.*/html"))
    return unpacked[-1]


def choose(docs: Path, pages: int) -> list[Source]:
    """All pages, or as many as asked: those that answer a question first, the others by chance."""
    found = {path.relative_to(docs).as_posix(): path for path in sorted(docs.rglob("*.html"))}
    if pages:
        wanted = [f"{name}.html" for _, names in QUESTIONS for name in names]
        others = sorted(set(found) - set(wanted))
        random.Random(3).shuffle(others)  # noqa: S311 - the same sample each time
        chosen = [name for name in dict.fromkeys([*wanted, *others]) if name in found][:pages]
        found = {name: found[name] for name in sorted(chosen)}
    return [Source(path, uri, path.stat().st_size) for uri, path in found.items()]


def embedded_texts(sources: Sequence[Source]) -> list[str]:
    """What the pipeline embeds of these pages, computed here by the same functions."""
    texts = []
    for source in sources:
        text = extract(source.path.read_bytes(), "text/html")
        title = title_of(text, source.path.name)
        texts += [entry.embedded(title) for entry in chunk(text, ChunkingPolicy())]
    return texts


# The backend.


@contextmanager
def backend(state: Path) -> Iterator[int]:
    """Everything, as a user starts it; gives the edge's port."""
    (state / "models").symlink_to(model_folder(), target_is_directory=True)
    port = free_port()
    plexus(state, "up", "--detach", "--port", str(port))
    try:
        yield port
    finally:
        plexus(state, "down")


def plexus(state: Path, *arguments: str) -> None:
    """Run the command."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
    done = subprocess.run(  # noqa: S603 - our own command
        [*PLEXUS, *arguments, "--state", str(state)],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
        env=env,
    )
    if done.returncode:
        sys.exit(f"plexus {' '.join(arguments)}: {done.stderr.strip()}")


async def embed_alone(texts: Sequence[str]) -> float:
    """Seconds that the inference service takes for texts, some full calls at once."""
    async with Mesh() as mesh:
        stub = mesh.stub(inference_pb2_grpc.InferenceServiceStub)
        gate = asyncio.Semaphore(EMBED_CALLS)

        async def call(part: Sequence[str]) -> None:
            async with gate:
                await stub.Embed(inference_pb2.EmbedRequest(texts=part), timeout=1800, wait_for_ready=True)

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for start in range(0, len(texts), EMBED_CALL):
                group.create_task(call(texts[start : start + EMBED_CALL]))
        return time.monotonic() - began


def ingest(knowledge: Knowledge, sources: Sequence[Source]) -> float:
    """Seconds from the first page sent to the last one that can be found."""
    began = time.monotonic()
    operations = [knowledge.ingest(batch) for batch in batches(sources)]
    done, shown = 0, time.monotonic()
    for operation in operations:
        last = {}
        for last in knowledge.watch(operation):
            if time.monotonic() - shown > 15:
                shown = time.monotonic()
                ready = done + int(last["readyCount"])
                print(f"{ready} of {len(sources)} pages, {shown - began:.0f} s", file=sys.stderr)
        for failure in last["failures"]:
            print(f"not ingested: {failure['uri']}: {failure['reason']}", file=sys.stderr)
        done += int(last["totalCount"])
    return time.monotonic() - began


def ask_all(knowledge: Knowledge, present: frozenset[str]) -> tuple[int, int, list[float]]:
    """Ask each question whose pages are there: hits, questions, seconds of each."""
    hits, times, asked = 0, [], 0
    print(f"\n{'':<4}{'page':<32}{'question':<70}")
    for question, names in QUESTIONS:
        pages = {f"{name}.html" for name in names}
        if not pages & present:
            continue
        began = time.monotonic()
        citations = knowledge.ask(question, generate=False).citations[:CITATIONS]
        times.append(time.monotonic() - began)
        first = next((each for each in citations if each["uri"] in pages), None)
        asked += 1
        hits += first is not None
        place = f"{first['number']}" if first else "-"
        print(f"{place:<4}{(first or citations[0])['uri']:<32}{question:<70}")
    return hits, asked, times


def main() -> None:
    """Ingest, compare, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--docs", type=Path, help="folder of the pages; default: installed, or fetched")
    parser.add_argument("--pages", type=int, default=0, help="only so many pages; default: all")
    parser.add_argument("--alone", type=int, default=1024, help="chunks for the embedder alone")
    parser.add_argument("--state", type=Path, help="keep everything here; default: a folder that is deleted")
    options = parser.parse_args()

    sources = choose(find_docs(options.docs), options.pages)
    texts = embedded_texts(sources)
    sample = random.Random(3).sample(texts, min(options.alone, len(texts)))  # noqa: S311 - as above
    half = len(sample) // 2
    with tempfile.TemporaryDirectory(prefix="plexus-bench-") as folder:
        state: Path = options.state or Path(folder)
        with backend(state) as port:
            catalogue = json.loads((state / "data/control/catalogue.json").read_text())
            control = next(each["port"] for each in catalogue["instances"] if each["service"] == "control")
            join_mesh("cli", state, control, 3600)
            asyncio.run(embed_alone(texts[:8]))  # loads the model
            alone_s = asyncio.run(embed_alone(sample[:half]))
            with Api(f"http://127.0.0.1:{port}", CredentialStore(state).mint_token("demo", 36000)) as api:
                knowledge = Knowledge(api, "python")
                knowledge.ensure()
                took_s = ingest(knowledge, sources)
                alone_s += asyncio.run(embed_alone(sample[half:]))
                hits, asked, times = ask_all(knowledge, frozenset(source.uri for source in sources))

    alone = len(sample) / alone_s
    chunks = len(texts) / took_s
    print(f"\n{'':<24}{'pages':>8}{'chunks':>8}{'s':>9}{'pages/s':>9}{'chunks/s':>9}")
    print(f"{'whole pipeline':<24}{len(sources):>8}{len(texts):>8}{took_s:>9.1f}", end="")
    print(f"{len(sources) / took_s:>9.2f}{chunks:>9.1f}")
    print(f"{'embedder alone':<24}{'':>8}{len(sample):>8}{alone_s:>9.1f}{'':>9}{alone:>9.1f}")
    print(f"\npipeline: {chunks / alone:.2f} of the embedder alone, bar at least {BAR_RATIO:g}")
    print(f"right page in the first {CITATIONS} citations: {hits} of {asked}, bar at least {BAR_HIT:.0%}")
    print(f"a question takes {1000 * sorted(times)[len(times) // 2]:.0f} ms without generation, the median")
    figures = {
        "hit_at_3": round(hits / asked, 3),
        "pipeline_ratio": round(chunks / alone, 3),
        "pages_per_s": round(len(sources) / took_s, 3),
        "chunks_per_s": round(chunks, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
