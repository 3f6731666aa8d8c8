"""The programs in other languages."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.polyglot.programs import POLYGLOT, PUBSUB, Caller
from tests.servers.programs import UnavailableServerError, require

_HERE = Path(__file__).resolve().parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the chosen tests run: a build takes minutes, which no test's timeout allows."""
    if session.config.option.collectonly:
        return
    # The hook is asked about every test there is, and other rooms have callers of their own.
    items = [
        item for item in session.items if isinstance(item, pytest.Function) and item.path.parent == _HERE
    ]
    wanted = {
        str(item.callspec.params["caller"])
        for item in items
        if hasattr(item, "callspec") and "caller" in item.callspec.params
    }
    if any("go_program" in item.fixturenames for item in items):
        wanted.add("go")
    for language in sorted(wanted):
        # Left to the fixture, which skips or fails with the reason.
        with contextlib.suppress(UnavailableServerError):
            POLYGLOT[language].provide()
    if any("pubsub_program" in item.fixturenames for item in items):
        with contextlib.suppress(UnavailableServerError):
            PUBSUB.provide()


@pytest.fixture(params=sorted(POLYGLOT))
def caller(request: pytest.FixtureRequest) -> Caller:
    """A client of the mesh, one after another in each language."""
    program = POLYGLOT[request.param]
    require(program)
    return program


@pytest.fixture
def go_program() -> Path:
    """The program in Go, which serves as well."""
    return require(POLYGLOT["go"]) / "program"


@pytest.fixture
def pubsub_program() -> Path:
    """Google Pub/Sub's client."""
    return require(PUBSUB) / "program"
