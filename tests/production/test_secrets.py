"""The secrets of the Compose file: made once, private, and what they have to be."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cryptography import x509

from tools import compose_secrets

if TYPE_CHECKING:
    from pathlib import Path

OWN = (os.getuid(), os.getgid())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_second_run_changes_nothing_and_what_was_removed_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert "consul-ca-key.pem" in compose_secrets.make(folder, OWN)
    before = contents(folder)
    assert list(compose_secrets.make(folder, OWN)) == []
    assert contents(folder) == before
    (folder / "rabbitmq-password-plexus").unlink()
    (folder / "edge-key.pem").unlink()
    made = compose_secrets.make(folder, OWN)
    assert set(made) == {"rabbitmq-password-plexus", "edge-key.pem", "edge.pem"}
    after = contents(folder)
    changed = {name for name, text in after.items() if before[name] != text}
    assert changed == {*made, "queueing-rabbitmq-url", "rabbitmq-definitions.json"}


def test_all_is_readable_by_its_owner_alone(secrets: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    for path in secrets.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_random_secrets_are_long_and_all_different(secrets: Path) -> None:
    random = [
        text for name, text in contents(secrets).items() if re.search(r"token-|password-|gossip-key", name)
    ]
    assert len(random) == len(set(random)) > 14
    assert min(map(len, random)) >= 36


def test_the_leaves_are_the_authority_s_and_name_their_roles(secrets: Path) -> None:
    authority = x509.load_pem_x509_certificate((secrets / "consul-ca.pem").read_bytes())
    for name, role in (("consul-server", "server"), ("consul-node", "client")):
        leaf = x509.load_pem_x509_certificate((secrets / f"{name}.pem").read_bytes())
        leaf.verify_directly_issued_by(authority)
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = found.get_values_for_type(x509.DNSName)
        assert f"{role}.dc1.consul" in hosts
        assert ("server.dc1.consul" in hosts) == (role == "server")


def test_rabbitmq_gets_the_digest_of_the_password_that_queueing_has(secrets: Path) -> None:
    password = urlsplit((secrets / "queueing-rabbitmq-url").read_text()).password or ""
    users = json.loads((secrets / "rabbitmq-definitions.json").read_text())["users"]
    kept = base64.b64decode({user["name"]: user["password_hash"] for user in users}["plexus"])
    assert kept[4:] == hashlib.sha256(kept[:4] + password.encode()).digest()
    assert password not in (secrets / "rabbitmq-definitions.json").read_text()
    assert {user["name"]: user["tags"] for user in users} == {"plexus": [], "operator": ["monitoring"]}
