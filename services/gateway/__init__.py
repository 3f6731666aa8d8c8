"""The edge: gateway/kong.yml rendered to Envoy."""
