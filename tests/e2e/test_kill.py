"""Kill -9 each process in turn while clients work: it comes back, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]
NAMES = ["control", "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge"]


class Writer(threading.Thread):
    """Stores objects until told to stop, and keeps a ledger of what was acknowledged."""

    def __init__(self, backend: Backend, prefix: str) -> None:
        super().__init__()
        self._client = backend.client()
        self._prefix = prefix
        self._end = threading.Event()
        self.acknowledged: dict[str, bytes] = {}
        self.refused: set[int] = set()
        self.unexpected: list[str] = []

    def run(self) -> None:
        number = 0
        while not self._end.wait(0.03):  # stays below the edge's rate limit
            number += 1
            key, content = f"{self._prefix}/{number}", f"content {number}".encode()
            try:
                answer = self._client.put(f"/v1/buckets/user-uploads/objects/{key}", content=content)
            except httpx.TransportError:
                self.refused.add(0)  # the edge itself is away
                continue
            if answer.is_success:
                self.acknowledged[key] = content
            elif answer.status_code in {502, 503, 504}:
                self.refused.add(answer.status_code)
            else:
                self.unexpected.append(f"{answer.status_code} {answer.text}")

    def finish(self) -> None:
        self._end.set()
        self.join()
        self._client.close()


def get(client: httpx.Client, path: str) -> httpx.Response:
    """GET, patient with the edge's rate limit."""
    while (answer := client.get(path)).status_code == 429:
        time.sleep(float(answer.headers["retry-after"]))
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_process_comes_back_and_nothing_acknowledged_is_lost(backend: Backend, name: str) -> None:
    before = backend.wait_serving()
    writer = Writer(backend, name)
    writer.start()
    try:
        eventually(lambda: len(writer.acknowledged) >= 3)
        os.kill(before[name]["pid"], signal.SIGKILL)
        eventually(lambda: backend.rows()[name]["restarts"] > before[name]["restarts"])
        after = backend.wait_serving()
        reached = len(writer.acknowledged)
        eventually(lambda: len(writer.acknowledged) >= reached + 3, explain=backend.log_tail)
    finally:
        writer.finish()
    assert writer.unexpected == []
    assert after[name]["pid"] != before[name]["pid"]
    others = {row: before[row]["pid"] for row in NAMES if row != name}
    assert others == {row: after[row]["pid"] for row in others}, "something else was restarted"
    with backend.client() as client:
        for key, content in writer.acknowledged.items():
            answer = get(client, f"/v1/buckets/user-uploads/objects/{key}")
            assert answer.content == content, key
