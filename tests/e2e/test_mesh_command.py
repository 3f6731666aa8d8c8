"""`plexus mesh …` against a running backend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_policy_is_compared_applied_shown_and_removed(backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "vectors.yaml"
    file.write_text("service: vectors\ntimeout: 3 s\n")
    refused = backend.plexus("mesh", "apply", str(file), check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"plexus: {file}:2: timeout: needs a length of time")
    file.write_text("service: vectors\ntimeout: 30s\n")
    assert "+timeout: 30s" in backend.plexus("mesh", "diff", str(file), check=False).stdout
    assert backend.plexus("mesh", "apply", str(file)).stdout == "vectors added\n"
    assert backend.plexus("mesh", "diff", str(file)).stdout == ""
    (policy,) = json.loads(backend.plexus("mesh", "get", "vectors", "--json").stdout)["policies"]
    assert policy["text"] == file.read_text()
    assert backend.plexus("mesh", "apply", "--remove", "vectors").stdout == "vectors removed\n"
    assert "default policy" in backend.plexus("mesh", "get", "vectors").stdout


def test_intentions_are_compared_applied_shown_and_removed(backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "reports.yaml"
    policy = tmp_path / "policy.yaml"
    rules = "Kind: service-intentions\nName: reports\nSources: [{Name: shop, Action: allow}]\n"
    file.write_text(rules.replace("allow", "maybe"))
    policy.write_text("service: policy\ntimeout: 30s\n")
    for command in ("apply", "diff"):
        refused = backend.plexus("mesh", command, str(tmp_path), check=False)
        assert refused.returncode == 1
        assert f"{file}:3: Sources[0].Action: " in refused.stderr
    # Of both kinds, none is written while one is at fault.
    assert "default policy" in backend.plexus("mesh", "get", "policy").stdout
    file.write_text(rules)
    policy.unlink()
    assert "+- Name: shop" in backend.plexus("mesh", "diff", str(file), check=False).stdout
    tried = backend.plexus("mesh", "apply", str(file), "--dry-run").stdout
    assert tried == "intentions of reports added (not written)\n"
    assert backend.plexus("mesh", "apply", str(file)).stdout == "intentions of reports added\n"
    assert backend.plexus("mesh", "diff", str(file)).stdout == ""
    assert rules in backend.plexus("mesh", "get", "reports", "--kind", "intentions").stdout
    (kept,) = json.loads(backend.plexus("mesh", "get", "reports", "--json").stdout)["intentions"]
    assert (kept["destination"], kept["text"]) == ("reports", rules)
    shown = backend.plexus("mesh", "intentions").stdout
    assert any(line.split() == ["reports", "shop", "allow"] for line in shown.splitlines())
    removed = backend.plexus("mesh", "apply", "--remove-intentions", "reports").stdout
    assert removed == "intentions of reports removed\n"
    assert "no intentions for reports" in backend.plexus("mesh", "get", "reports").stdout


def test_explain_shows_that_every_client_has_accepted_what_is_current(backend: Backend) -> None:
    def everything_accepted() -> bool:
        told = json.loads(backend.plexus("mesh", "explain", "storage", "--json").stdout)
        assert [entry["health"] for entry in told["instances"]] == ["serving"]
        peers = {follower["peer"] for follower in told["followers"]}
        resources = [entry for follower in told["followers"] for entry in follower["resources"]]
        assert not any(entry["refusal"] for entry in resources)
        return peers >= {"edge", "knowledge"} and all(entry["current_accepted"] for entry in resources)

    eventually(everything_accepted, within_s=60)


def test_to_explain_what_nobody_knows_is_an_error(backend: Backend) -> None:
    told = backend.plexus("mesh", "explain", "storrage", check=False)
    assert told.returncode == 1
    assert "no instance of storrage is registered" in told.stderr


@pytest.mark.parametrize("command", ["intentions", "graph", "clients", "get"])
def test_every_view_is_a_table_and_json(backend: Backend, command: str) -> None:
    assert json.loads(backend.plexus("mesh", command, "--json").stdout)
    assert "storage" in backend.plexus("mesh", command).stdout or command == "get"
