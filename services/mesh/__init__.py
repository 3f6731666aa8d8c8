"""The control plane: registry, identities, intentions, and xDS made from them."""
