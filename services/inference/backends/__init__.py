"""Engines behind Embedder and ChatModel."""
