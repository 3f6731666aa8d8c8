"""The `consul` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from services.runtime.config import Section


class ConsulConfig(Section):
    """Where Consul is and how it is asked. Without an address the mesh needs no Consul and runs its own."""

    address: str = ""
    """The local agent's HTTP API as `http://host:port` or `https://host:port`; empty: the registry,
    intentions and certificates of Plexus itself."""
    grpc_address: str = ""
    """gRPC API of a Consul server as `host:port`, which signs certificates; empty: the host of `address`, and
    port 8502, with TLS 8503."""
    token: SecretStr | None = None
    """ACL token. If Consul has ACLs on, one is needed: reads without a token come back empty, not refused."""
    datacentre: str = ""
    """Consul datacentre; empty: the agent's own."""
    ca: Path | None = None
    """PEM file of the authority that signed the agent's certificate; for https."""
    certificate: Path | None = None
    """PEM file of this client's certificate, if the agent demands one."""
    key: Path | None = None
    """PEM file of its key."""
    wait_s: float = Field(default=30.0, ge=0.5, le=300)
    """Longest blocking query in seconds; also the bound on staleness after Consul's data were restored."""
    check_interval_s: float = Field(default=10.0, ge=0.1, le=60)
    """Pause between two health checks of an instance in seconds."""
    deregister_after_s: float = Field(default=60.0, ge=60, le=86400)
    """An instance whose check fails for this long, in seconds, is removed; Consul's least is a minute."""
    request_timeout_s: float = Field(default=10.0, gt=0, le=60)
    """Deadline of a request that does not block, in seconds."""

    @field_validator("address")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in {"http", "https"} or not parts.hostname):
            raise ValueError("must be http://host:port or https://host:port")
        return value.rstrip("/")

    @property
    def secret(self) -> str:
        """The token in clear, empty if there is none."""
        return self.token.get_secret_value() if self.token else ""

    @property
    def enabled(self) -> bool:
        """Whether Consul is used at all."""
        return bool(self.address)

    @property
    def tls(self) -> bool:
        """Whether the agent is spoken to over TLS."""
        return self.address.startswith("https:")

    @property
    def signer(self) -> str:
        """The gRPC API's host:port."""
        return self.grpc_address or f"{urlsplit(self.address).hostname}:{8503 if self.tls else 8502}"
