"""Configuration of the knowledge service."""

from __future__ import annotations

from services.knowledge.domain import Style
from services.runtime.config import Section


class KnowledgeConfig(Section):
    """Section `knowledge`."""

    workers: int = 8
    """Documents worked on at once; their chunks share the embedding batches."""
    extraction_timeout_s: float = 60.0
    """A document whose text is not extracted by then has failed."""
    answer_style: Style = Style.QUOTED
    """How answers are made unless the request says it: `quoted` from the documents, right and at once, or
    `written` by the chat model, which wants a larger one than the embedded."""
    answer_tokens: int = 160
    """Longest written answer."""
    support_threshold: float = 0.75
    """Support from which a sentence counts as supported; texts on one subject that say different things reach
    0.6."""
