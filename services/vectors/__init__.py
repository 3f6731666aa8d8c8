"""The vectors service."""
