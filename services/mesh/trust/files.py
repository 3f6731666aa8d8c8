"""The three files of an identity: written so that a reader sees old or new, and keys only by their owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import ec

CERT, KEY, CA = "cert.pem", "key.pem", "ca.pem"


def write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file by rename, durable, never readable by others for an instant."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8: Java's gRPC reads no SEC1 keys."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, for its owner alone, and hold its lock."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_identity(folder: Path, *, key: bytes, cert: bytes, ca: bytes) -> None:
    """Write all three.

    All three at every rotation, the CA last: some gRPC clients take a new leaf only when the CA file changes
    too, and our servers take its change as the sign that the pair is complete.
    """
    write(folder / KEY, key, 0o600)
    write(folder / CERT, cert, 0o644)
    write(folder / CA, ca, 0o644)
