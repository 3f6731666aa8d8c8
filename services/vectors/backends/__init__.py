"""Engines of the vectors service, one module each."""
