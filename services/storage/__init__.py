"""Objects in buckets."""
