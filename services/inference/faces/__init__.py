"""The field's own protocols, translated to the domain."""
