"""Configuration as the command sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from services.cli.supervisor import rundir
from services.runtime.config import MeshConfig, Settings
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.cli.supervisor.rundir import RunDir

_MAX_PORT = 65_535


class EdgeAddress(NamedTuple):
    """Where the edge listens, and the URL at which this machine reaches it."""

    host: str
    port: int
    url: str


def edge_address(port: int | None) -> EdgeAddress:
    """Where the edge will be: the option, then the configuration.

    Raises:
        InvalidArgumentError: The configuration of the edge is wrong: better told here than by a child.
    """
    from services.gateway.config import GatewayConfig  # noqa: PLC0415 - pydantic is slow to import

    config = Settings().section("gateway", GatewayConfig)
    configured = config.port if port is None else port
    if not 1 <= configured <= _MAX_PORT:
        raise InvalidArgumentError(f"gateway.port is {configured}: must be 1 to {_MAX_PORT}")
    return EdgeAddress(config.host, configured, config.url(configured))


def control_port(run_dir: RunDir) -> int:
    """Port of the control plane on this host: the configuration, else the one kept in the state folder.

    Raises:
        InvalidArgumentError: The section is wrong.
        FailedPreconditionError: No port is free.
    """
    return Settings().section("mesh", MeshConfig).control_port or rundir.control_port(run_dir)
