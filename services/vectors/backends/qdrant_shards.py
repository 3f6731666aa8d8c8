"""An open shard of the embedded store, and what is asked of its one writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import qdrant_edge as engine

from services.runtime.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.vectors.backends.qdrant_files import Stored

MAX_JOURNAL_POINTS = 50_000
"""Points written while a copy of their shard is being optimised; with more, the copy is given up."""


@dataclass(slots=True)
class Journal:
    """Operations since a shard was copied; those of too many points are dropped, and with them the copy."""

    operations: list[Any] = field(default_factory=list)
    points: int = 0
    overflowed: bool = False

    def append(self, operation: Any, points: int) -> None:
        """Keep an operation that concerns so many points."""
        self.points += points
        self.overflowed = self.overflowed or self.points > MAX_JOURNAL_POINTS
        if self.overflowed:
            self.operations.clear()
        else:
            self.operations.append(operation)


@dataclass(slots=True, eq=False)
class Shard:
    """An open collection. Only the writer thread changes it.

    Attributes:
        stored: Its files.
        engine: The engine's shard; opened at first use, by whichever thread comes first.
        unflushed: Points written since the last flush.
        changed: Points changed since the last optimisation.
        journal: Operations since the copy that is being optimised was made; None when there is none.
        deleted: Whether the collection is gone.
    """

    stored: Stored
    engine: Any = None
    unflushed: int = 0
    changed: int = 0
    journal: Journal | None = None
    deleted: bool = False

    def live(self) -> Any:
        """The engine's shard.

        Raises:
            NotFoundError: The collection is gone.
        """
        if self.deleted:
            raise unknown(self.stored.spec.name)
        return self.engine


@dataclass(frozen=True, slots=True)
class Write:
    """A job of the writer thread.

    Attributes:
        shard: The collection; None for work that concerns none.
        apply: Does it.
        durable: Whether the shard's log must reach the disk before the caller is told.
    """

    shard: Shard | None
    apply: Callable[[], object]
    durable: bool = True


def load(folder: Path) -> Any:
    """Open the engine's shard in a folder."""
    return engine.EdgeShard.load(str(folder))


def unknown(name: str) -> NotFoundError:
    """The error for a collection that is not there."""
    return NotFoundError(
        f"there is no collection {name!r}", reason="COLLECTION_NOT_FOUND", metadata={"collection": name}
    )
