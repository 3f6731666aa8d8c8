"""kong.yml, credentials and the mesh rendered to Envoy's configuration; pure functions to JSON."""
