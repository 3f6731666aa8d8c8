"""Server-side mTLS from files that change while the server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import grpc

if TYPE_CHECKING:
    from pathlib import Path


class IdentityFiles(Protocol):
    """Paths of a certificate chain, its PKCS#8 key and the CA, all PEM."""

    @property
    def cert_path(self) -> Path:
        """The chain, leaf first."""
        ...

    @property
    def key_path(self) -> Path:
        """The key."""
        ...

    @property
    def ca_path(self) -> Path:
        """The trusted roots."""
        ...


def server_credentials(identity: IdentityFiles) -> grpc.ServerCredentials:
    """Credentials that demand a client certificate and follow the files at each new handshake.

    The CA file is compared, since rotation rewrites it last (services.mesh.trust): a new mtime means that
    certificate and key are complete.
    """

    def stamp() -> int:
        return identity.ca_path.stat().st_mtime_ns

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (identity.key_path.read_bytes(), identity.cert_path.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], identity.ca_path.read_bytes())

    seen = stamp()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        now = stamp()
        if now == seen:
            return None
        seen = now
        return read()

    # None keeps the present configuration, as grpc documents; the type stubs do not know.
    return grpc.dynamic_ssl_server_credentials(
        read(),
        fetch,  # type: ignore[arg-type]
        require_client_authentication=True,
    )
