"""Configuration of the inference service."""

from __future__ import annotations

from services.runtime.config import Section


class InferenceConfig(Section):
    """Section `inference`."""

    embed_batch: int = 32
    """Most texts computed at once; long ones are fewer."""
    embed_queue: int = 8192
    """Texts that may wait; one more is refused."""
    embed_threads: int = 2
    """Embedding computations at once, each on one core."""
    chat_threads: int = 2
    """Threads of one generation."""
    chat_context_tokens: int = 4096
    """Longest conversation, answer included; the memory of a loaded chat model grows with it."""
    chat_queue: int = 16
    """Conversations that may wait while one is answered; one more is refused."""
