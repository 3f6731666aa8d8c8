"""The Dockerfile's steps, as far as they can be judged without an engine."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import tomllib
from typing import NamedTuple

import pytest

from services.mesh.consul import verdict
from tests.production.compose import ROOT

KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


class Step(NamedTuple):
    """An instruction and what follows it, on one line."""

    instruction: str
    text: str


def stages() -> list[list[Step]]:
    """The stages; the arguments before the first are one of their own."""
    lines = [
        line
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    found: list[list[Step]] = [[]]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, text = line.partition(" ")
        assert instruction in KNOWN, line
        if instruction == "FROM":
            found.append([])
        found[-1].append(Step(instruction, text))
    return found


def copied() -> set[str]:
    """What the build stage takes from the checkout."""
    copies = [step.text.split() for step in stages()[1] if step.instruction == "COPY"]
    return {source for copy in copies for source in copy[:-1]}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of ours from the builder; the last line that fits counts."""
    answer = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        fits = pattern in {"*", path} or path.startswith(f"{pattern}/")
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in path.split("/"))
        if line.strip() and not line.startswith("#") and fits:
            answer = not line.startswith("!")
    return answer


def test_what_is_copied_is_in_the_checkout_and_reaches_the_builder() -> None:
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for kept_out in ("secrets/edge-key.pem", ".env", ".git/config", "tests/conftest.py", "services/a.pyc"):
        assert ignored(kept_out), kept_out


def test_the_wheel_finds_all_that_it_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for path in [*wheel["packages"], *wheel["force-include"], project["project"]["readme"]]:
        assert any(path == source or path.startswith(f"{source}/") for source in copied()), path


def test_versions_are_pinned_and_those_of_the_project() -> None:
    arguments = dict(
        step.text.split("=", 1) for stage in stages() for step in stage if step.instruction == "ARG"
    )
    makefile = (ROOT / "Makefile").read_text()
    assert f"UV_VERSION := {arguments['UV_VERSION']}\n" in makefile
    assert re.fullmatch(r"3\.\d+\.\d+-slim-[a-z]+", arguments["PYTHON"])
    assert {stage[0].text.split(" AS ")[0] for stage in stages()[1:]} == {"python:${PYTHON}"}
    installs = [step.text for step in stages()[1] if "uv sync" in step.text]
    assert len(installs) == 2
    assert all("--frozen" in text and "--no-dev" in text for text in installs)


def test_the_image_runs_plexus_as_nobody_special_and_says_how_it_is() -> None:
    last = {step.instruction: step.text for step in stages()[-1]}
    assert last["USER"] == "plexus"
    assert json.loads(last["ENTRYPOINT"]) == ["plexus"]
    check = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert check[:2] == ["python", "-m"]
    assert importlib.util.find_spec(check[2]) is not None
    assert "PLEXUS_STATE=/state" in last["ENV"]


@pytest.mark.parametrize(
    ("command", "instance"),
    [
        ("/sbin/docker-init -- /opt/plexus/bin/python /opt/plexus/bin/plexus serve vectors", "vectors-1"),
        ("plexus serve --number 3 inference", "inference-3"),
        ("plexus serve inference --number=2 --state /state", "inference-2"),
    ],
)
def test_the_health_check_knows_its_instance(command: str, instance: str) -> None:
    assert verdict.instance_of(command.split()) == instance


@pytest.mark.parametrize("command", ["sleep infinity", "plexus serve", "plexus serve a b"])
def test_the_health_check_of_something_else_is_an_error(command: str) -> None:
    with pytest.raises(ValueError, match=r"serve|names"):
        verdict.instance_of(command.split())
