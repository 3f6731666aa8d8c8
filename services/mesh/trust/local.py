"""The local certificate authority: minted on first start, leaves signed by whoever may read its key.

All processes of a laptop run as one user, so a signing service would guard nothing that the folder's mode
does not; the interface is that of the Connect CA, which does keep them apart.
"""

from __future__ import annotations

import asyncio
import os
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.mesh.trust.domain import Identity, spiffe_id
from services.mesh.trust.files import locked, private_pem, write, write_identity
from services.mesh.trust.names import LOOPBACK, alternative_names, covers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger(__name__)

CA_LIFE = timedelta(days=3650)
BACKDATE = timedelta(minutes=1)
"""Clocks of two machines differ; a fresh certificate must not be "not yet valid"."""
RENEW_AT = 2 / 3
"""Share of its life after which a leaf is renewed."""
_RETRY_S = 5.0


class LocalCA:
    """A self-signed root in `<state>/ca`: `ca.pem` and `ca.key` (0600)."""

    def __init__(self, folder: Path) -> None:
        """Open the authority, minting it if the folder has none."""
        with locked(folder):
            cert_path, key_path = folder / "ca.pem", folder / "ca.key"
            if not cert_path.is_file():
                key = ec.generate_private_key(ec.SECP256R1())
                write(key_path, private_pem(key), 0o600)
                write(cert_path, _self_signed(key).public_bytes(serialization.Encoding.PEM), 0o644)
            loaded = serialization.load_pem_private_key(key_path.read_bytes(), None)
            if not isinstance(loaded, ec.EllipticCurvePrivateKey):
                raise TypeError(f"{key_path} does not hold an elliptic curve key")
            self._key = loaded
            self.pem = cert_path.read_bytes()
            self._cert = x509.load_pem_x509_certificate(self.pem)

    def sign(
        self, service: str, key: ec.EllipticCurvePublicKey, ttl: timedelta, address: str = LOOPBACK
    ) -> x509.Certificate:
        """Issue a leaf: the SPIFFE id, and host names for clients that check those."""
        now = datetime.now(UTC)
        names = alternative_names(spiffe_id(service), service, address)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)]))
            .issuer_name(self._cert.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + ttl)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.now(UTC)
    # The name tells two authorities apart: a chain must not be built from another state folder's root.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Plexus local CA {os.urandom(4).hex()}")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


class LocalCertificateSource:
    """Identity of one service from the local CA, in `<state>/identities/<service>`."""

    def __init__(self, state_dir: Path, service: str, ttl_s: float, address: str = LOOPBACK) -> None:
        """Name the service; nothing is read or written yet.

        Args:
            state_dir: The state folder.
            service: Whose identity.
            ttl_s: Life of a leaf in seconds.
            address: IP address at which the service may be dialled.
        """
        self._state_dir = state_dir
        self._address = address
        self._service = service
        self._ttl = timedelta(seconds=ttl_s)
        self._folder = state_dir / "identities" / service

    def ensure(self) -> Identity:
        """Return the identity on disk if it is young enough and of this CA, else a new one."""
        ca = LocalCA(self._state_dir / "ca")
        with locked(self._folder):
            current = self._load(ca)
            if current is not None and datetime.now(UTC) < self._renewal_time(current):
                return current
            return self._issue(ca)

    async def obtain(self) -> Identity:
        """See CertificateSource."""
        return await asyncio.to_thread(self.ensure)

    async def rotate(self, on_change: Callable[[Identity], None]) -> None:
        """Renew the files at two thirds of their life, with jitter, for ever."""
        while True:
            identity = self.ensure()
            wait = (self._renewal_time(identity) - datetime.now(UTC)).total_seconds()
            await asyncio.sleep(max(0.05, wait * random.uniform(0.95, 1.0)))  # noqa: S311 - spreads load only
            try:
                renewed = self._renew()
            except OSError as error:
                # A full disk must not end the process while the old certificate still holds.
                log.warning("certificate_renewal_failed", error=type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                continue
            log.info("certificate_renewed", not_after=renewed.not_after.isoformat())
            on_change(renewed)

    def _renew(self) -> Identity:
        ca = LocalCA(self._state_dir / "ca")
        with locked(self._folder):
            return self._issue(ca)

    def _renewal_time(self, identity: Identity) -> datetime:
        return identity.not_after - self._ttl * (1 - RENEW_AT)

    def _identity(self, not_after: datetime) -> Identity:
        return Identity(
            spiffe_id=spiffe_id(self._service),
            cert_path=self._folder / "cert.pem",
            key_path=self._folder / "key.pem",
            ca_path=self._folder / "ca.pem",
            not_after=not_after,
        )

    def _load(self, ca: LocalCA) -> Identity | None:
        try:
            cert = x509.load_pem_x509_certificate((self._folder / "cert.pem").read_bytes())
            complete = (self._folder / "key.pem").is_file() and (
                self._folder / "ca.pem"
            ).read_bytes() == ca.pem
        except (OSError, ValueError, x509.ExtensionNotFound):
            return None
        return self._identity(cert.not_valid_after_utc) if complete and covers(cert, self._address) else None

    def _issue(self, ca: LocalCA) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        cert = ca.sign(self._service, key.public_key(), self._ttl, self._address)
        identity = self._identity(cert.not_valid_after_utc)
        pem = cert.public_bytes(serialization.Encoding.PEM)
        write_identity(self._folder, key=private_pem(key), cert=pem, ca=ca.pem)
        return identity
