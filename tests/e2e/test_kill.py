"""Kill -9 each process in turn while clients work: it comes back, and nothing acknowledged is lost."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]
COLLECTION = "/v1/knowledge/collections/kill"
UNAVAILABLE = 14
NAMES = ["control", "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge"]


class Worker(threading.Thread):
    """Does one thing over and over until told to stop, and keeps a ledger of what was acknowledged."""

    def __init__(self, backend: Backend, name: str, pause_s: float) -> None:
        super().__init__(name=f"{type(self).__name__}-{name}")
        self.client = backend.client()
        self.prefix = name
        self._pause_s = pause_s
        self._end = threading.Event()
        self.acknowledged: dict[str, bytes] = {}
        self.unexpected: list[str] = []

    def attempt(self, number: int) -> None:
        raise NotImplementedError

    def run(self) -> None:
        number = 0
        while not self._end.wait(self._pause_s):  # stays below the edge's rate limit
            number += 1
            try:
                self.attempt(number)
            except httpx.TransportError:
                continue  # the edge itself is away, or a stream was reset rather than ended as if complete

    def allowed(self, answer: httpx.Response) -> bool:
        """Whether it worked; what is neither success nor unavailable is kept as unexpected."""
        if not answer.is_success and answer.status_code not in {502, 503, 504}:
            self.unexpected.append(f"{answer.status_code} {answer.text}")
        return answer.is_success

    def has(self, count: int) -> bool:
        return len(self.acknowledged) >= count

    def finish(self) -> None:
        self._end.set()
        self.join()
        self.client.close()


class Writer(Worker):
    """Stores objects."""

    def attempt(self, number: int) -> None:
        key, content = f"{self.prefix}/{number}", f"content {number}".encode()
        if self.allowed(self.client.put(f"/v1/buckets/user-uploads/objects/{key}", content=content)):
            self.acknowledged[key] = content


class Ingester(Worker):
    """Ingests documents; the ledger holds the operations."""

    def attempt(self, number: int) -> None:
        text = f"# {self.prefix} {number}\n\nThe code of {self.prefix} is {number * 7919}."
        document = {"uri": f"{self.prefix}/{number}.md", "content": base64.b64encode(text.encode()).decode()}
        answer = self.client.post(f"{COLLECTION}/documents:ingest", json={"documents": [document]})
        if self.allowed(answer):
            self.acknowledged[answer.json()["id"]] = text.encode()


class Asker(Worker):
    """Asks with a generated answer; the ledger holds those that were complete."""

    def attempt(self, number: int) -> None:
        question = {"question": "What is kept after a kill?", "generate": True, "limit": 2}
        answer = self.client.post(f"{COLLECTION}:ask", json=question)
        if not self.allowed(answer):
            return
        events = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
        last = events[-1]
        if "answer" in last:
            self.acknowledged[str(number)] = answer.content
        elif last.get("error", {}).get("code") != UNAVAILABLE:
            self.unexpected.append(f"the stream ended with {last}")


def get(client: httpx.Client, path: str) -> httpx.Response:
    """GET, patient with the edge's rate limit."""
    while (answer := client.get(path)).status_code == 429:
        time.sleep(float(answer.headers["retry-after"]))
    return answer


def done(client: httpx.Client, operation: str) -> bool:
    return bool(get(client, f"/v1/knowledge/operations/{operation}").json()["done"])


@pytest.fixture(scope="module")
def knowledge(backend: Backend) -> Backend:
    backend.wait_serving()
    text = base64.b64encode(b"After a kill everything that was acknowledged is kept.")
    with backend.client() as client:
        made = client.post("/v1/knowledge/collections", json={"name": "kill"})
        assert made.is_success, made.text
        documents = [{"uri": "promise.md", "content": text.decode()}]
        taken = client.post(f"{COLLECTION}/documents:ingest", json={"documents": documents}).json()
        eventually(partial(done, client, taken["id"]), 60, backend.log_tail)
    return backend


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_process_comes_back_and_nothing_acknowledged_is_lost(knowledge: Backend, name: str) -> None:
    backend = knowledge
    before = backend.wait_serving()
    workers = [Writer(backend, name, 0.05), Ingester(backend, name, 0.3), Asker(backend, name, 0.3)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            eventually(partial(worker.has, 1), 60, backend.log_tail)
        os.kill(before[name]["pid"], signal.SIGKILL)
        eventually(lambda: backend.rows()[name]["restarts"] > before[name]["restarts"], 60)
        after = backend.wait_serving(60)
        for worker in workers:
            eventually(partial(worker.has, len(worker.acknowledged) + 1), 60, backend.log_tail)
    finally:
        for worker in workers:
            worker.finish()
    assert [worker.unexpected for worker in workers] == [[], [], []]
    assert after[name]["pid"] != before[name]["pid"]
    others = {row: before[row]["pid"] for row in NAMES if row != name}
    assert others == {row: after[row]["pid"] for row in others}, "something else was restarted"
    writer, ingester, _ = workers
    with backend.client() as client:
        for key, content in writer.acknowledged.items():
            answer = get(client, f"/v1/buckets/user-uploads/objects/{key}")
            assert answer.content == content, key
        for operation in ingester.acknowledged:
            eventually(partial(done, client, operation), 90, backend.log_tail)
            outcome = get(client, f"/v1/knowledge/operations/{operation}").json()
            assert outcome["readyCount"] + outcome["unchangedCount"] == 1, outcome
