"""Configuration of the knowledge service."""

from __future__ import annotations

from services.runtime.config import Section


class KnowledgeConfig(Section):
    """Section `knowledge`."""

    workers: int = 8
    """Documents worked on at once; their chunks share the embedding batches."""
    extraction_timeout_s: float = 60.0
    """A document whose text is not extracted by then has failed."""
    answer_tokens: int = 160
    """Longest generated answer."""
    support_threshold: float = 0.5
    """Support from which a sentence counts as supported."""
