"""Documents that are ingested, searched and asked."""
