"""Everything that talks to Consul's API; the registry, trust and intentions of the mesh are built on it."""
