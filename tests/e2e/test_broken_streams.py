"""A backend that fails in the middle of an answer never makes it look complete, on HTTP/1.1 either."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
OBJECT = "/v1/buckets/user-uploads/objects/broken/big"
CONTENT = os.urandom(1024 * 1024) * 32


def _contents(backend: Backend) -> set[str]:
    return {str(path) for path in (backend.state / "data/storage/blobs").glob("??/*")}


def _download(client: httpx.Client, received: bytearray, begun: Callable[[], None] = lambda: None) -> None:
    with client.stream("GET", OBJECT) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_raw(64 * 1024):
            if not received:
                begun()
            received += piece


def test_damage_found_in_mid_download_ends_the_connection(backend: Backend) -> None:
    with backend.client() as client:
        before = _contents(backend)
        assert client.put(OBJECT, content=CONTENT).is_success
        (blob,) = _contents(backend) - before
        with Path(blob).open("r+b") as file:
            file.seek(20 * 1024 * 1024)
            file.write(b"damage")
        received = bytearray()
        with pytest.raises(httpx.RemoteProtocolError):
            _download(client, received)
        assert len(received) < len(CONTENT)
        assert bytes(received) == CONTENT[: len(received)], "a damaged byte was sent"
        at_once = client.get(OBJECT, headers={"Range": "bytes=20971520-20971530"})
        assert at_once.status_code == 500
        assert at_once.json()["details"][0]["reason"] == "CONTENT_DAMAGED"
        # The connection that broke took nothing with it.
        assert client.get(OBJECT, headers={"Range": "bytes=0-9"}).content == CONTENT[:10]


def test_a_service_killed_in_mid_download_ends_the_connection(backend: Backend) -> None:
    before = backend.wait_serving()
    with backend.client() as client:
        assert client.put(OBJECT, content=CONTENT).is_success
        received = bytearray()
        with pytest.raises(httpx.TransportError):
            _download(client, received, begun=lambda: os.kill(before["storage"]["pid"], signal.SIGKILL))
        assert 0 < len(received) < len(CONTENT)
        eventually(lambda: backend.rows()["storage"]["restarts"] > before["storage"]["restarts"], 60)
        backend.wait_serving(60)
        eventually(lambda: client.get(OBJECT).content == CONTENT, 30)


def test_a_model_killed_in_mid_answer_is_told_or_the_connection_ends(backend: Backend) -> None:
    before = backend.wait_serving()
    question = {"messages": [{"role": "ROLE_USER", "content": "Count from one to five hundred."}]}
    with backend.client() as client:
        events: list[dict[str, object]] = []
        try:
            with client.stream("POST", "/v1/inference:chat", json={**question, "max_tokens": 2000}) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    if not events:
                        os.kill(before["inference"]["pid"], signal.SIGKILL)
                    events.append(json.loads(line[5:]))
        except httpx.TransportError:
            pass  # cut off: no client takes that for an end
        else:
            assert "error" in events[-1], f"looks complete: {events[-1]}"
        eventually(lambda: backend.rows()["inference"]["restarts"] > before["inference"]["restarts"], 60)
        backend.wait_serving(60)
        again = client.post("/v1/inference:chat", json=question, timeout=120)
        last = [json.loads(line[5:]) for line in again.text.splitlines() if line.startswith("data:")][-1]
        assert last["finishReason"] != "FINISH_REASON_UNSPECIFIED"
