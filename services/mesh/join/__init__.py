"""Programs of any language in the mesh: bootstrap, certificate files kept fresh, registration."""
