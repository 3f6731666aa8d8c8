"""Traffic policy: how callers treat each service."""
