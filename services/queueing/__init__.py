"""Messages that must not be lost."""
