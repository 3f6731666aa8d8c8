"""Every command and program of README.md and the handbook, run as a reader would run it.

The blocks of one page run in order in one shell, so that a variable set in one is there in the next. The
address of the pages, 127.0.0.1:8000, is replaced by that of the test's own backend, and port 8123, of a
second Plexus, by a free one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import PAGES, ROOT, fits, read
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.docs.pages import Page
    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
PORT, SECOND_PORT = "8000", "8123"
WITHIN_S = 1000
RUNNABLE = [page for page in map(read, PAGES) if page.steps()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout and may be written to."""
    for name in ("examples", "gateway", "consul", "protos", "README.md"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp_path / name)
    (tmp_path / "docs").symlink_to("examples/handbook")
    return tmp_path


def script_of(page: Page, folder: Path, ports: dict[str, str]) -> str:
    """One bash script of all steps; each writes what it prints to `N.out`."""
    # What a page that fails has left in the background would answer for the next one.
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for number, step in enumerate(page.steps()):
        text = _replaced(step.text, ports)
        if step.language == "python":
            program = folder / f"{number}.py"
            program.write_text(text)
            text = f"python {program}"
        lines += [f"echo {number} > {folder}/at", "{", text, f"}} > {folder}/{number}.out"]
    return "\n".join(lines) + "\n"


def _replaced(text: str, ports: dict[str, str]) -> str:
    for old, new in ports.items():
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}").replace(f"--port {old}", f"--port {new}")
    return text


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_each_command_works_and_prints_what_the_page_shows(
    backend: Backend, checkout: Path, tmp_path_factory: pytest.TempPathFactory, page: Page
) -> None:
    backend.wait_serving(within_s=120)
    folder = tmp_path_factory.mktemp("steps")
    ports = {PORT: str(backend.port), SECOND_PORT: str(free_port())}
    script = folder / "page.sh"
    script.write_text(script_of(page, folder, ports))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PLEXUS_", "GRPC_"))}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=checkout,
        env=clean
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PLEXUS_STATE": str(backend.state),
            "PLEXUS_GATEWAY__PORT": str(backend.port),
            "COLUMNS": "100",
            "NO_COLOR": "1",
        },
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    steps = page.steps()
    if done.returncode != 0:
        at = int((folder / "at").read_text())
        printed = (folder / f"{at}.out").read_text()
        raise AssertionError(
            f"{page.name}:{steps[at].line} ended with {done.returncode}\n{steps[at].text}\n"
            f"printed: {printed}\n{done.stderr}\n{backend.log_tail()}"
        )
    for number, step in enumerate(steps):
        printed = _replaced((folder / f"{number}.out").read_text(), {new: old for old, new in ports.items()})
        assert fits(step, printed), (
            f"{page.name}:{step.line}\n{step.text}\nprinted:\n{printed}\n"
            f"not, as the page shows:\n{step.expected}"
        )
