"""Other protocols' servers on the same domain."""
