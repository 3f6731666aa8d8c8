"""Configuration as the command sees it."""

from __future__ import annotations

from pydantic import ConfigDict

from services.runtime.config import Section, Settings
from services.runtime.errors import InvalidArgumentError

LOOPBACK = "127.0.0.1"


class _EdgePort(Section):
    """The part of the section `gateway` that the command reads before the edge starts."""

    model_config = ConfigDict(extra="ignore")

    port: int = 8000


def edge_address(port: int | None) -> tuple[str, int]:
    """Host and port of the edge: the option, then the configuration.

    Raises:
        InvalidArgumentError: The configuration is wrong: better told here than by a child.
    """
    configured = Settings().section("gateway", _EdgePort).port if port is None else port
    if not 1 <= configured <= 65535:  # noqa: PLR2004 - TCP's range
        raise InvalidArgumentError(f"gateway.port is {configured}: must be 1 to 65535")
    return LOOPBACK, configured
