"""Configuration of the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from services.runtime.addresses import is_loopback, netloc
from services.runtime.config import IPAddress, Section


class GatewayConfig(Section):
    """The public side; routes, consumers and limits are in kong.yml."""

    host: IPAddress = "127.0.0.1"
    """IP address to listen on; one that others can reach needs `tls_certificate` and `tls_key`."""
    port: int = 8000
    """Port for clients; `plexus up --port` goes before it."""
    tls_certificate: Path | None = None
    """PEM file of the public certificate and its chain; clients must then use TLS. Followed when replaced."""
    tls_key: Path | None = None
    """PEM file of its key."""
    kong_path: Path | None = None
    """The declarative file; default: gateway/kong.yml as shipped."""
    drain_s: float = 5.0
    """How long running requests may go on at a stop."""
    reload_interval_s: float = 1.0
    """How often kong.yml and the credentials are looked at for changes."""
    workers: int = 2
    """Envoy's worker threads."""

    @model_validator(mode="after")
    def _secure(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_certificate is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} can be reached by others, so it needs tls_certificate and tls_key"
            )
        return self

    @property
    def reachable_at(self) -> str:
        """The address to which this machine connects."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return loopback.get(self.host, self.host)

    def url(self, port: int) -> str:
        """Where this machine reaches an edge on a port."""
        scheme = "http" if self.tls_certificate is None else "https"
        return f"{scheme}://{netloc(self.reachable_at, port)}"
