"""Make the secrets of docker-compose.yml, once.

    python -m tools.compose_secrets            # what is missing in secrets/, and .env

What is random is made if its file is missing and never changed: to replace a secret, remove its file and run
this again. Files that only put secrets into another form are written anew each time. Every file is readable
by its owner alone: who runs this, and, since that is not root in the containers either, the images are built
for that user. For root it is the user 10001.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import ipaddress
import json
import os
import secrets
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("control", "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge")
NODES = ("consul", "node-a", "node-b")
IMAGE_USER = 10001
"""User and group of the image unless it is built for another."""
_PASSWORD_BYTES = 32
_GOSSIP_BYTES = 32
_AUTHORITY_DAYS, _LEAF_DAYS = 3650, 825
_CLOCKS = timedelta(minutes=5)


class Folder:
    """The folder of secrets; files appear whole and private."""

    def __init__(self, path: Path, owner: tuple[int, int]) -> None:
        self.path = path
        self._owner = owner
        self.made: list[str] = []
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        self._own(path)

    def _own(self, path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, *self._owner)

    def read(self, name: str) -> str:
        """The content of a file."""
        return (self.path / name).read_text()

    def write(self, name: str, content: str) -> None:
        """Put a file in place; what is there and the same stays."""
        target = self.path / name
        if target.exists() and target.read_text() == content:
            return
        temporary = self.path / f".{name}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._own(temporary)
        temporary.replace(target)

    def once(self, name: str, make: Callable[[], str]) -> str:
        """A secret, made if it is missing."""
        if not (self.path / name).exists():
            self.write(name, make())
            self.made.append(name)
        return self.read(name)


def _password() -> str:
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("an elliptic-curve key is expected")
    return key


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    *,
    days: int,
    issuer: x509.Name | None = None,
    signer: ec.EllipticCurvePrivateKey | None = None,
    hosts: Sequence[str] = (),
    client: bool = False,
) -> str:
    """A certificate in PEM; its own issuer unless one is given, an authority if it names no host."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signing = signer or key
    authority = not hosts
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(
            x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if not authority:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if client else [])]
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
        ).add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    signed = builder.sign(signing, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pair(folder: Folder, name: str, make: Callable[[ec.EllipticCurvePrivateKey], str]) -> None:
    """A key and its certificate; without the key the certificate is worth nothing, so both are made anew."""
    if not (folder.path / f"{name}-key.pem").exists():
        (folder.path / f"{name}.pem").unlink(missing_ok=True)
    key = folder.once(f"{name}-key.pem", lambda: _pem(ec.generate_private_key(ec.SECP256R1())))
    folder.once(f"{name}.pem", lambda: make(_key(key)))


def _certificates(folder: Folder) -> None:
    _pair(folder, "consul-ca", lambda key: _certificate("Plexus Consul authority", key, days=_AUTHORITY_DAYS))
    authority = x509.load_pem_x509_certificate(folder.read("consul-ca.pem").encode()).subject
    signer = _key(folder.read("consul-ca-key.pem"))
    for name, role in (("consul-server", "server"), ("consul-node", "client")):
        hosts = [f"{role}.dc1.consul", "localhost", "127.0.0.1", *(["consul"] if role == "server" else [])]

        def sign(key: ec.EllipticCurvePrivateKey, hosts: list[str] = hosts) -> str:
            return _certificate(
                hosts[0], key, days=_LEAF_DAYS, issuer=authority, signer=signer, hosts=hosts, client=True
            )

        _pair(folder, name, sign)
    # Its own authority, until the operator puts one in place that browsers know.
    public = ("localhost", "127.0.0.1", "edge")
    _pair(folder, "edge", lambda key: _certificate("Plexus edge", key, days=_LEAF_DAYS, hosts=public))


def _consul(folder: Folder) -> None:
    gossip = folder.once(
        "consul-gossip-key", lambda: base64.b64encode(secrets.token_bytes(_GOSSIP_BYTES)).decode()
    )
    management = folder.once("consul-token-management", lambda: str(uuid.uuid4()))
    for service in SERVICES:
        folder.once(f"consul-token-{service}", lambda: str(uuid.uuid4()))
    for node in NODES:
        tokens = {"agent": folder.once(f"consul-token-{node}", lambda: str(uuid.uuid4()))}
        if node == "consul":
            tokens["initial_management"] = management
        # On an agent that knows a key already, this one is ignored: `consul keyring` replaces it.
        content = {"encrypt": gossip, "acl": {"tokens": tokens}}
        folder.write(f"consul-agent-{node}.json", json.dumps(content, indent=1) + "\n")


def _salted(password: str, salt: bytes) -> str:
    """A password as RabbitMQ keeps it: a salt of four bytes before the digest of both, in base64."""
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _rabbitmq(folder: Folder) -> None:
    service = folder.once("rabbitmq-password-plexus", _password)
    operator = folder.once("rabbitmq-password-operator", _password)
    definitions: dict[str, Any] = json.loads((ROOT / "rabbitmq" / "definitions.json").read_text())
    # Sees everything in the management UI, may read no message and change nothing.
    definitions["users"].append({"name": "operator", "tags": ["monitoring"]})
    definitions["permissions"].append(
        {"user": "operator", "vhost": "plexus", **dict.fromkeys(("configure", "write", "read"), "^$")}
    )
    given = {"plexus": service, "operator": operator}
    for user in definitions["users"]:
        password = given[user["name"]]
        # Of the password, so that the file does not change without it.
        salt = hashlib.sha256(b"salt" + password.encode()).digest()[:4]
        user["password_hash"] = _salted(password, salt)
        user["hashing_algorithm"] = "rabbit_password_hashing_sha256"
    folder.write("rabbitmq-definitions.json", json.dumps(definitions, indent=1) + "\n")
    folder.write("queueing-rabbitmq-url", f"amqp://plexus:{service}@rabbitmq:5672/plexus")


def _postgres(folder: Folder) -> None:
    folder.once("postgres-password", _password)
    service = folder.once("postgres-password-plexus", _password)
    # An owner of one database and nothing else. The alphabet of the password has no quote.
    folder.write(
        "postgres-init.sql",
        f"CREATE ROLE plexus LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '{service}';\n"
        "CREATE DATABASE plexus OWNER plexus;\n"
        "REVOKE ALL ON DATABASE plexus FROM PUBLIC;\n",
    )
    folder.write("queueing-state-url", f"postgresql://plexus:{service}@postgres:5432/plexus")


def make(path: Path, owner: tuple[int, int]) -> Iterable[str]:
    """Make what is missing.

    Args:
        path: The folder of secrets.
        owner: User and group of the files, if this runs as root.

    Returns:
        Names of the secrets that are new.
    """
    folder = Folder(path, owner)
    _certificates(folder)
    _consul(folder)
    _rabbitmq(folder)
    _postgres(folder)
    return folder.made


def owner() -> tuple[int, int]:
    """User and group that the image is built for: who runs this, but never root."""
    return (os.getuid(), os.getgid()) if os.getuid() else (IMAGE_USER, IMAGE_USER)


def main() -> int:
    """Make secrets and `.env`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT, help="where secrets/ and .env are made")
    folder: Path = parser.parse_args().folder
    user, group = owner()
    made = list(make(folder / "secrets", (user, group)))
    environment = folder / ".env"
    if not environment.exists():
        environment.write_text(f"HOST_UID={user}\nHOST_GID={group}\n")
    print(f"{len(made)} secrets made in {folder / 'secrets'}" if made else "all secrets are there already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
