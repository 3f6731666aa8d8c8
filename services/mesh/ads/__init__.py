"""Aggregated discovery, state of the world: each client is kept up to date about what it subscribed to."""
