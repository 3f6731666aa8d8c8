"""What the page on production says of the Compose file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.production.compose import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.production.compose import Project

PAGE = (ROOT / "examples" / "handbook" / "production.md").read_text()
_OPTIONS = r"(?: --?[A-Za-z-]+)*"


def test_commands_name_services_that_exist(project: Project) -> None:
    named = re.findall(rf"docker compose (?:exec|logs|up){_OPTIONS} ([a-z][\w-]*)", PAGE)
    assert {"edge", "control-a", "queueing-a"} <= set(named)
    assert set(named) <= set(project.services)
    # What is in code and looks like a container is one.
    code = set(re.findall(r"`([a-z]+-[ab])`", PAGE))
    assert code <= set(project.services)


def test_the_backup_has_every_volume_but_the_models(project: Project) -> None:
    (listed,) = re.findall(r"for volume in (.*); do", PAGE)
    assert set(listed.split()) == set(project.content["volumes"]) - {"models"}
    assert f'"{project.content["name"]}_$volume:' in PAGE
    assert project.content["services"]["postgres"]["image"] in PAGE


def test_the_addresses_and_files_are_those_of_the_compose_file(project: Project, secrets: Path) -> None:
    published = {
        port["published"]
        for service in project.services.values()
        for port in service.content.get("ports") or []
    }
    assert set(re.findall(r"`https?://localhost:(\d+)", PAGE)) == published
    named = set(re.findall(r"secrets/([\w.-]+[\w])", PAGE)) | set(re.findall(r"`([\w-]+\.pem)`", PAGE))
    assert len(named) > 4
    assert named <= {path.name for path in secrets.iterdir()}
