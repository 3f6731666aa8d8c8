"""Fetching models with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.inference.models import MANIFEST, ModelStore, fetch_models
from services.inference.models.store import spec_of
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.progress import TaskID


def pull(state_dir: Path, names: list[str]) -> list[str]:
    """Fetch what is missing.

    Args:
        state_dir: The state folder.
        names: Models; all of the manifest if empty.

    Returns:
        The names, all here now.

    Raises:
        PlexusError: An unknown model, an unreachable index, or content that is not what the manifest says.
    """
    wanted = names or list(MANIFEST)
    for name in wanted:
        spec_of(name)
    store = ModelStore(state_dir / "models")
    missing = [name for name in wanted if not store.available(name)]
    if not missing:
        return wanted
    from rich.console import Console  # noqa: PLC0415 - slow to import, and mostly nothing is missing
    from rich.progress import (  # noqa: PLC0415 - the same
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for name in missing:
            tasks: dict[str, TaskID] = {}

            def show(
                file: str, done: int, total: int, tasks: dict[str, TaskID] = tasks, name: str = name
            ) -> None:
                if file not in tasks:
                    tasks[file] = bar.add_task(f"{name} {file}", total=None)
                # The length counts once bytes are unpacked; until then the bar moves without one.
                bar.update(tasks[file], completed=done, total=total if done else None)

            fetch_models([name], state_dir, show)
    return wanted


def fetch_missing(state_dir: Path, warn: Callable[[str], None]) -> None:
    """Fetch the models that are not here yet, before a start; without them a start goes on.

    Args:
        state_dir: The state folder.
        warn: Told in one line what cannot be fetched.
    """
    try:
        pull(state_dir, [])
    except PlexusError as error:
        warn(f"{error.message}; starting without: embeddings and chat work after `plexus models pull`")
