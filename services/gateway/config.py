"""Configuration of the edge."""

from __future__ import annotations

from pathlib import Path

from services.runtime.config import Section


class GatewayConfig(Section):
    """The public side; routes, consumers and limits are in kong.yml."""

    port: int = 8000
    """Port for clients on the loopback address; `plexus up --port` goes before it."""
    kong_path: Path | None = None
    """The declarative file; default: gateway/kong.yml as shipped."""
    drain_s: float = 5.0
    """How long running requests may go on at a stop."""
    reload_interval_s: float = 1.0
    """How often kong.yml and the credentials are looked at for changes."""
    workers: int = 2
    """Envoy's worker threads."""
