"""Standard APIs in front of the store."""
