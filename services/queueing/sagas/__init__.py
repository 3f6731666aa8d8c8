"""Sagas: work in steps that is done as a whole or undone."""
