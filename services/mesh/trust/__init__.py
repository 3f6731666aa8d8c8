"""Identities: where a process gets its certificate from and how it stays fresh."""
