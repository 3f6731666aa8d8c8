"""Engines behind ObjectStore."""
