"""Options that many commands have, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plexus.client.state import default_state_dir
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

PRIORITIES = ("low", "normal", "high", "critical")
StateOption = Annotated[
    Path | None,
    typer.Option("--state", help="State folder. Default: PLEXUS_STATE, else the user's data folder."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UrlOption = Annotated[
    str | None, typer.Option(help="Edge. Default: PLEXUS_URL, else the one that runs on the state folder.")
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", help="JSON Web Token. Default: PLEXUS_TOKEN, else one of the consumer's is minted."
    ),
]
ConsumerOption = Annotated[str, typer.Option(help="Who asks, as named in gateway/kong.yml.")]


def state_folder(given: Path | None) -> Path:
    """The folder that was named, else the one that is meant without a name."""
    return given if given is not None else default_state_dir()


def print_json(value: Any) -> None:
    """Print for programs."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """A value of an option as the API's enums have it.

    Raises:
        InvalidArgumentError: It is none of those allowed.
    """
    if value.lower() not in allowed:
        raise InvalidArgumentError(f"--{option}: {value!r} is none of {', '.join(allowed)}")
    return value.upper()
