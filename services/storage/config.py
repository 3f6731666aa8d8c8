"""Configuration of the storage service."""

from __future__ import annotations

from services.runtime.config import Section


class StorageConfig(Section):
    """Section `storage`."""

    max_object_bytes: int = 5 * 1024**3
    """Largest object taken."""
    default_buckets: tuple[str, ...] = ("workflow-artifacts", "agent-outputs", "user-uploads")
    """Buckets made at the start if they do not exist."""
