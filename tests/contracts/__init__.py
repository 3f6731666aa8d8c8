"""One suite for each domain Protocol; a backend's test module subclasses it."""
