"""Starting, looking, stopping."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.backend import alive

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.backend import Backend

pytestmark = pytest.mark.e2e
NAMES = ["control", "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge"]


def test_status_tells_all_that_is_promised_of_every_process(backend: Backend) -> None:
    status = json.loads(backend.plexus("status", "--json").stdout)
    assert [row["service"] for row in status["services"]] == NAMES
    for row in status["services"]:
        assert row["state"] == "serving", backend.log_tail()
        assert row["version"]
        assert alive(row["pid"])
        assert row["address"].startswith("127.0.0.1:")
        assert row["pss_bytes"] > 1_000_000
        assert row["uptime_s"] > 0
    assert len({row["address"] for row in status["services"]}) == len(NAMES)


def test_the_edge_answers_and_asks_for_a_token(backend: Backend) -> None:
    assert httpx.get(f"{backend.url}/healthz").status_code == 200
    assert httpx.get(f"{backend.url}/v1/buckets").status_code == 401
    with backend.client() as client:
        assert client.get("/v1/buckets").status_code == 200


def test_a_second_up_is_refused_in_one_line(backend: Backend) -> None:
    refused = backend.plexus("up", check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "plexus down" in refused.stderr


def test_doctor_finds_nothing_wrong(backend: Backend, models: Path) -> None:
    assert models.is_dir()
    backend.plexus("doctor")


def test_what_was_stored_is_there_after_down_and_up(backend: Backend) -> None:
    with backend.client() as client:
        assert client.put("/v1/buckets/user-uploads/objects/kept", content=b"kept").status_code == 200
    pids = [row["pid"] for row in backend.rows().values()]
    backend.plexus("down")
    assert not any(alive(pid) for pid in pids)
    backend.up()
    with backend.client() as client:
        assert client.get("/v1/buckets/user-uploads/objects/kept").content == b"kept"


def test_a_killed_supervisor_takes_everything_with_it_and_loses_nothing(backend: Backend) -> None:
    with backend.client() as client:
        assert client.put("/v1/buckets/user-uploads/objects/safe", content=b"safe").status_code == 200
    status = backend.status()
    os.kill(status["supervisor"]["pid"], signal.SIGKILL)
    backend.up()  # waits for the processes of the killed one
    assert not any(alive(row["pid"]) for row in status["services"])
    with backend.client() as client:
        assert client.get("/v1/buckets/user-uploads/objects/safe").content == b"safe"
