"""Configuration of the search service."""

from __future__ import annotations

from services.runtime.config import Section


class SearchConfig(Section):
    """Bounds of the search service and settings of its embedded engine."""

    max_batch_documents: int = 5000
    """Documents in one batch, and ids in one delete."""
    max_document_bytes: int = 1024 * 1024
    """Largest document, as JSON."""
    default_page_size: int = 10
    """Hits of a page when the caller names no number."""
    max_page_size: int = 1000
    """Most hits, or indexes, of a page."""
    max_depth: int = 10_000
    """How many hits deep pages reach."""
    max_indexes: int = 256
    """Indexes, the default ones included."""
    max_waiting_writes: int = 1000
    """Writes that may wait for the writer; one more gets RESOURCE_EXHAUSTED."""
    writer_heap_bytes: int = 32 * 1024 * 1024
    """Memory of one index's writer, made at its first write; at least 15 MiB."""
    max_open_writers: int = 4
    """Indexes with a writer at the same time; beyond, the one unused for longest is closed."""
    writer_idle_s: float = 30.0
    """A writer unused for this long gives its memory back."""
    min_free_disk_bytes: int = 64 * 1024 * 1024
    """Writes are refused below this, so that reading and deleting still work on a full disk."""
