"""Where servers come from."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.servers import programs
from tests.servers.programs import CONSUL, GoProgram, UnavailableServerError, require

if TYPE_CHECKING:
    from pathlib import Path

HELLO = GoProgram("plexus-hello", "a moment", ".", "example.org/pinned")
SOURCE = 'package main\n\nfunc main() { println("hello") }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a module to build beside it."""
    module = tmp_path / "go" / HELLO.name
    module.mkdir(parents=True)
    (module / "go.mod").write_text("module plexus.test/hello\n\ngo 1.24\n\n// example.org/pinned v1.2.3\n")
    (module / "main.go").write_text(SOURCE)
    monkeypatch.setattr(programs, "_HERE", tmp_path)
    monkeypatch.setattr(programs, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_who_comes_while_a_build_runs_gets_the_same_build(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: HELLO.provide(), range(4)))
    assert paths == {cache / "plexus-hello-v1.2.3" / "plexus-hello"}
    assert capfd.readouterr().err.count("building plexus-hello v1.2.3") == 1
    assert subprocess.run([*paths], capture_output=True, check=True, timeout=60).stderr == b"hello\n"


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_a_build_that_fails_leaves_nothing_and_says_why(cache: Path) -> None:
    (HELLO.folder / "main.go").write_text("package main\n\nfunc main() { undefined() }\n")
    with pytest.raises(UnavailableServerError, match="undefined"):
        HELLO.provide()
    assert [path.name for path in cache.glob("*/*")] == [".lock"]


def test_without_go_a_test_is_skipped_with_the_command_and_in_ci_it_fails(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make servers"):
        require(HELLO)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make servers"):
        require(HELLO)


def test_consul_is_pinned_in_one_place() -> None:
    assert CONSUL.version == "v1.22.2"
    assert CONSUL.cached.parent.name == "consul-v1.22.2"
    assert (CONSUL.folder / "go.sum").is_file()
