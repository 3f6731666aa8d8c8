"""The hand-written server side of Plexus."""
