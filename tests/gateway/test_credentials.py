"""The credential store: what it keeps, for whom, and what its tokens say."""

from __future__ import annotations

import json
import stat
import threading
from typing import TYPE_CHECKING

import jwt
import pytest

from services.gateway.credentials import Algorithm, CredentialStore
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


def test_ensure_mints_once_and_keeps_the_file_private(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path / "state")
    first = store.ensure(["demo", "admin"])
    assert store.ensure(["demo", "admin"]) == first
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert first["demo"][0].secret != first["admin"][0].secret
    assert [name.name for name in store.path.parent.iterdir() if "tmp" in name.name] == []


def test_ensure_from_many_threads_leaves_one_credential_each(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path)
    seen: list[object] = []
    threads = [threading.Thread(target=lambda: seen.append(store.ensure(["demo"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert all(item == seen[0] for item in seen)
    assert len(json.loads(store.path.read_text())["consumers"]["demo"]) == 1


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256"])
def test_token_verifies_with_the_stored_key_alone(tmp_path: Path, algorithm: Algorithm) -> None:
    store = CredentialStore(tmp_path)
    credential = store.ensure(["demo"], algorithm=algorithm)["demo"][0]
    token = store.mint_token("demo", 60)
    claims = jwt.decode(token, jwt.PyJWK(credential.jwk()), algorithms=[algorithm])
    assert claims["iss"] == credential.key
    assert claims["sub"] == "demo"
    assert claims["exp"] - claims["iat"] == 60
    assert claims["nbf"] == claims["iat"] - 5
    assert set(claims) == {"iss", "sub", "iat", "nbf", "exp", "jti"}
    assert "d" not in credential.jwk()


def test_foreign_public_key_is_kept_and_cannot_sign_here(tmp_path: Path) -> None:
    other = CredentialStore(tmp_path / "other").ensure(["demo"], algorithm="ES256")["demo"][0]
    store = CredentialStore(tmp_path / "state")
    added = store.add("demo", "ES256", public_key=other.public_key)
    assert added.private_key is None
    with pytest.raises(FailedPreconditionError, match="not kept here"):
        store.mint_token("demo")
    with pytest.raises(InvalidArgumentError, match="does not fit RS256"):
        store.add("demo", "RS256", public_key=other.public_key)


def test_unknown_consumer_and_odd_lives_are_refused(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path)
    store.ensure(["demo"])
    with pytest.raises(NotFoundError, match="known: demo"):
        store.mint_token("nobody")
    for ttl_s in (0, -5, 10**9):
        with pytest.raises(InvalidArgumentError):
            store.mint_token("demo", ttl_s)


def test_damaged_file_is_reported_without_its_secrets(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path)
    store.path.write_text(
        '{"version": 1, "consumers": {"demo": [{"key": "k", "secret": "hush-hush", "algorithm": "HS999"}]}}'
    )
    with pytest.raises(InvalidArgumentError) as caught:
        store.mint_token("demo")
    assert "algorithm" in str(caught.value) or "secret" in str(caught.value)
    assert "hush-hush" not in str(caught.value)
    store.path.write_text("{")
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        store.mint_token("demo")
