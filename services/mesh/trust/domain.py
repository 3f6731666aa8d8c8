"""What any source of certificates gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

TRUST_DOMAIN = "plexus.local"
"""SPIFFE trust domain of the local CA."""


def spiffe_id(service: str, *, trust_domain: str = TRUST_DOMAIN, datacentre: str = "local") -> str:
    """The SPIFFE id of a service, in the form that Consul's Connect CA issues."""
    return f"spiffe://{trust_domain}/ns/default/dc/{datacentre}/svc/{service}"


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate on disk.

    Attributes:
        spiffe_id: URI SAN of the leaf.
        cert_path: PEM chain, leaf first.
        key_path: PEM PKCS#8 key, mode 0600.
        ca_path: PEM roots to trust; always the last of the three files to be written.
        not_after: End of the leaf's life, UTC.
    """

    spiffe_id: str
    cert_path: Path
    key_path: Path
    ca_path: Path
    not_after: datetime


def domain_of(identity: Identity) -> str:
    """What the SPIFFE ids of all services of an authority begin with, up to `/svc/`."""
    return identity.spiffe_id.rpartition("/svc/")[0]


class CertificateSource(Protocol):
    """Gives a process its identity and keeps the files fresh."""

    async def obtain(self) -> Identity:
        """Return a valid identity, made or renewed if need be; wait for an authority that is away."""
        ...

    def ensure(self) -> Identity:
        """The same for a program that runs no event loop yet."""
        ...

    async def rotate(self, on_change: Callable[[Identity], None]) -> None:
        """Renew before expiry, for ever; tell of each new identity."""
        ...
