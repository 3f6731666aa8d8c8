"""Configuration of the vectors service."""

from __future__ import annotations

from services.runtime.config import Section


class VectorsConfig(Section):
    """Bounds of the vectors service and settings of its embedded engine."""

    max_batch_points: int = 5000
    """Points in one upsert, and ids in one delete."""
    max_payload_bytes: int = 1024 * 1024
    """Largest payload of one point, as JSON."""
    max_text_bytes: int = 256 * 1024
    """Longest text to embed, of a point or a query, in UTF-8."""
    default_page_size: int = 50
    """Points or collections of a page when the caller names no number."""
    max_page_size: int = 1000
    """Most points or collections of a page, and most results of a search."""
    default_limit: int = 10
    """Results of a search when the caller names no number."""
    max_offset: int = 10_000
    """Most results a search may skip."""
    max_collections: int = 256
    """Collections; each open one costs a few MiB."""
    max_waiting_writes: int = 1000
    """Writes that may wait for the writer; one more gets RESOURCE_EXHAUSTED."""
    flush_after_points: int = 20_000
    """Points written to a collection between two flushes, which keep the write-ahead log short."""
    optimize_after_points: int = 20_000
    """Points changed in a collection before it is optimised (graph index built, deleted points dropped) in a
    process of its own; 0 never does."""
    min_free_disk_bytes: int = 96 * 1024 * 1024
    """Writes are refused below this: the engine maps files into memory and would be killed by a full disk."""
