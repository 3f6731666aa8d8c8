"""Engines of the search service, one module each."""
