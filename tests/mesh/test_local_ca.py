"""The local CA and the files it keeps."""

from __future__ import annotations

import asyncio
import stat
from typing import TYPE_CHECKING

from cryptography import x509

from services.mesh.trust.local import LocalCertificateSource

if TYPE_CHECKING:
    from pathlib import Path

    from services.mesh.trust.domain import Identity


def _uris(identity: Identity) -> list[str]:
    cert = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_first_use_mints_a_root_and_a_leaf_that_it_signed(tmp_path: Path) -> None:
    identity = LocalCertificateSource(tmp_path, "vectors", 3600).ensure()
    root = x509.load_pem_x509_certificate(identity.ca_path.read_bytes())
    leaf = x509.load_pem_x509_certificate(identity.cert_path.read_bytes())
    leaf.verify_directly_issued_by(root)
    assert _uris(identity) == ["spiffe://plexus.local/ns/default/dc/local/svc/vectors"]


def test_keys_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    identity = LocalCertificateSource(tmp_path, "vectors", 3600).ensure()
    for key in (identity.key_path, tmp_path / "ca" / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert b"BEGIN PRIVATE KEY" in key.read_bytes()


def test_a_young_identity_is_kept_and_an_old_one_replaced(tmp_path: Path) -> None:
    source = LocalCertificateSource(tmp_path, "vectors", 3600)
    first = source.ensure()
    content = first.cert_path.read_bytes()
    assert source.ensure().cert_path.read_bytes() == content
    longer = LocalCertificateSource(
        tmp_path, "vectors", 3 * 3600
    )  # now less than a third of its life is left
    assert longer.ensure().cert_path.read_bytes() != content


def test_a_leaf_of_another_root_is_replaced(tmp_path: Path) -> None:
    source = LocalCertificateSource(tmp_path, "vectors", 3600)
    content = source.ensure().cert_path.read_bytes()
    (tmp_path / "ca" / "ca.pem").unlink()
    assert source.ensure().cert_path.read_bytes() != content


async def test_rotation_rewrites_all_three_files_before_expiry(tmp_path: Path) -> None:
    source = LocalCertificateSource(tmp_path, "vectors", 0.6)
    first = source.ensure()
    before = [path.stat().st_mtime_ns for path in (first.cert_path, first.key_path, first.ca_path)]
    changed: asyncio.Queue[Identity] = asyncio.Queue()
    task = asyncio.create_task(source.rotate(changed.put_nowait))
    try:
        renewed = await asyncio.wait_for(changed.get(), 5)
    finally:
        task.cancel()
    assert renewed.not_after >= first.not_after
    after = [path.stat().st_mtime_ns for path in (first.cert_path, first.key_path, first.ca_path)]
    assert all(new > old for new, old in zip(after, before, strict=True))
