"""Where Plexus keeps what it has on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from collections.abc import Mapping


def default_state_dir(environment: Mapping[str, str] | None = None) -> Path:
    """The folder that holds everything Plexus keeps: `PLEXUS_STATE`, else the user's data folder."""
    env = os.environ if environment is None else environment
    configured = env.get("PLEXUS_STATE")
    return Path(configured) if configured else Path(platformdirs.user_data_dir("plexus"))
