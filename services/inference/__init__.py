"""Embeddings and chat."""
