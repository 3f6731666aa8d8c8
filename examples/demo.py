"""Plexus in one run: start everything, ingest the handbook, ask three questions over REST, stop.

    make demo

Exit code 0 means that every answer cited the right document. The state folder (.build/demo) is kept, so that
a second run starts in seconds.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from services.cli import content
from services.cli.api import Api
from services.cli.knowledge import Answer, Knowledge
from services.cli.models import pull
from services.gateway.credentials import CredentialStore
from services.runtime.errors import PlexusError

REPOSITORY = Path(__file__).resolve().parents[1]
HANDBOOK = REPOSITORY / "examples" / "handbook"
COLLECTION = "handbook"
PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the document that answers it."""

    text: str
    document: str


QUESTIONS = (
    Question("What happens to a message after its last attempt?", "handbook/queueing.md"),
    Question("Which buckets exist from the start?", "handbook/storage.md"),
    Question("How large is a chunk and how much text does it aim at?", "handbook/knowledge.md"),
)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def plexus(state: Path, *arguments: str) -> int:
    """Run the command; its exit code."""
    return subprocess.run([*PLEXUS, *arguments, "--state", str(state)], check=False).returncode  # noqa: S603 - our own command


def ask(knowledge: Knowledge, number: int, question: Question) -> bool:
    """Ask, print the answer, and say whether it cites the right document."""
    print(f"\n{number}. {question.text}")
    began = time.monotonic()
    first: list[float] = []

    def show(sentence: str) -> None:
        first.append(time.monotonic() - began)
        print(f"   {sentence}", flush=True)

    answer: Answer = knowledge.ask(question.text, on_sentence=show)
    took = time.monotonic() - began
    for citation in answer.citations:
        print(f"   {content.citation_line(citation)}")
    right = question.document in answer.uris
    verdict = "cites" if right else "does NOT cite"
    shown = f"first sentence after {first[0]:.1f} s, " if first else ""
    print(f"   {shown}all after {took:.1f} s; {verdict} {question.document}")
    return right


def talk(url: str, state: Path) -> bool:
    """Ingest and ask over REST with a token of the consumer `demo`."""
    token = CredentialStore(state).mint_token("demo")
    with Api(url, token) as api:
        began = time.monotonic()
        result = content.ingest(api, COLLECTION, [HANDBOOK])
        print(f"ingested {result['documents']} documents in {time.monotonic() - began:.1f} s")
        for failure in result["failures"]:
            print(f"   not ingested: {failure}")
        knowledge = Knowledge(api, COLLECTION)
        answers = [ask(knowledge, number, question) for number, question in enumerate(QUESTIONS, 1)]
    return all(answers) and not result["failed"]


def main() -> int:
    """Run the demo; 0 if each answer cited the right document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--state", type=Path, default=REPOSITORY / ".build" / "demo", help="state folder")
    state = parser.parse_args().state.resolve()
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    began = time.monotonic()
    print("models", flush=True)
    pull(state, [])
    port = free_port()
    started = False
    try:
        if plexus(state, "up", "--detach", "--port", str(port)) != 0:
            return 1
        started = True
        right = talk(f"http://127.0.0.1:{port}", state)
    finally:
        # Also after Ctrl-C in the middle of a start: whatever came up goes down.
        if started or (state / "run" / "control.sock").exists():
            print("\nstopping")
            plexus(state, "down")
    verdict = "done" if right else "FAILED: an answer cites another document"
    print(f"\n{verdict}, {time.monotonic() - began:.1f} s in all")
    print(
        f"""
go on:
  make up                         start everything; Ctrl-C stops it
  . .venv/bin/activate            put `plexus` on the PATH, then:
  plexus up --detach --state {state}
                                  the same in the background, with this demo's documents
  plexus token --consumer demo    a token for the API at http://127.0.0.1:8000 (read /docs there)
  plexus ingest PATH              your own documents
  plexus ask "..."                your own questions
README.md goes on from here."""
    )
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except PlexusError as error:
        sys.exit(f"demo: {error.message}")
