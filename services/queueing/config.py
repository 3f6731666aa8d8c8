"""Configuration of the queueing service."""

from __future__ import annotations

from services.runtime.config import Section


class QueueingConfig(Section):
    """Section `queueing`."""

    dedup_window_s: float = 600.0
    """How long a deduplication id is remembered."""
    max_waiting_writes: int = 20_000
    """Publishes, pulls and acknowledgements that may wait for the disk; one more is refused."""
    full_sync: bool = True
    """Whether a publish waits until the disk has it; without, the loss of power may lose messages."""
