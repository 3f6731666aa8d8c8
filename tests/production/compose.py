"""docker-compose.yml as Compose's own loader reads it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECRETS = "/run/secrets"
_LOAD_S = 60


@dataclass(frozen=True, slots=True)
class Service:
    """One service of the file.

    Attributes:
        name: Its name.
        content: What the loader makes of it, short forms spelt out.
    """

    name: str
    content: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        return dict(self.content.get("environment") or {})

    @property
    def command(self) -> list[str]:
        """Its command."""
        return list(self.content.get("command") or [])

    @property
    def is_ours(self) -> bool:
        """Whether it runs our image."""
        return str(self.content["image"]).startswith("plexus:")

    @property
    def process(self) -> str:
        """The process of Plexus that it serves, or nothing."""
        return self.command[1] if self.is_ours and self.command[:1] == ["serve"] else ""

    @property
    def node(self) -> str:
        """The service whose network it shares, or nothing."""
        kind, _, name = str(self.content.get("network_mode") or "").partition(":")
        return name if kind == "service" else ""

    @property
    def secrets(self) -> dict[str, str]:
        """Names of its secrets by their paths in the container."""
        found = {}
        for secret in self.content.get("secrets") or []:
            target = secret.get("target") or secret["source"]
            found[target if target.startswith("/") else f"{SECRETS}/{target}"] = secret["source"]
        return found

    def mounts(self) -> list[dict[str, Any]]:
        """Volumes and bind mounts."""
        return list(self.content.get("volumes") or [])


@dataclass(frozen=True, slots=True)
class Project:
    """The whole file."""

    content: dict[str, Any]

    @property
    def services(self) -> dict[str, Service]:
        """The services by name."""
        return {name: Service(name, content) for name, content in self.content["services"].items()}

    def processes(self) -> list[Service]:
        """Those that serve a process of Plexus."""
        return [service for service in self.services.values() if service.process]

    def address(self, node: str) -> str:
        """The IP address of a node."""
        return str(self.content["services"][node]["networks"]["plexus"]["ipv4_address"])


def load(program: Path, file: Path = ROOT / "docker-compose.yml", **environment: str) -> Project:
    """Load a file.

    Raises:
        ValueError: Compose refuses it; the text is its reason.
    """
    given = [f"{name}={value}" for name, value in environment.items()]
    done = subprocess.run(
        [program, file, *given], capture_output=True, text=True, timeout=_LOAD_S, check=False
    )
    if done.returncode != 0:
        raise ValueError(done.stderr.strip())
    return Project(json.loads(done.stdout))
