"""The whole backend with a real Consul in place of its own registry, authority and rules."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.backend import Backend, eventually
from tests.models import model_folder
from tests.ports import free_port
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
SERVICES = {"control", "vectors", "storage", "search", "inference", "queueing", "knowledge"}
TEXT = "The harbour of Plockton has palm trees."
EMBED = {"model": "minilm", "input": "hello"}
RULES = "/config/service-intentions/inference"


@pytest.fixture(scope="module")
def agent(consul_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    with ConsulAgent(consul_program, tmp_path_factory.mktemp("consul")) as started:
        yield started


@pytest.fixture(scope="module")
def backend(agent: ConsulAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    environment = {"PLEXUS_CONSUL__ADDRESS": agent.url, "PLEXUS_CONSUL__GRPC_ADDRESS": agent.grpc}
    made = Backend(tmp_path_factory.mktemp("state"), free_port(), environment)
    (made.state / "models").symlink_to(model_folder(), target_is_directory=True)
    try:
        made.up()
        yield made
    finally:
        made.down()


def healthy(consul: httpx.Client) -> set[str]:
    """Services of Plexus that have an instance and no check that fails."""
    rows: list[dict[str, Any]] = consul.get("/internal/ui/services", params={"dc": "dc1"}).json()
    return {row["Name"] for row in rows if row["InstanceCount"] and not row["ChecksCritical"]} - {"consul"}


def embeds(client: httpx.Client) -> int:
    try:
        return client.post("/v1/embeddings", json=EMBED).status_code
    except httpx.TransportError:
        return 0  # the edge starts anew


def until(client: httpx.Client, status: int, backend: Backend, within_s: float = 60) -> None:
    seen: list[int] = []

    def answered() -> bool:
        seen.append(embeds(client))
        return seen[-1] == status

    def explain() -> str:
        lines = (backend.state / "run/logs/inference.log").read_text().splitlines()
        rules = httpx.get(f"{backend.environment['PLEXUS_CONSUL__ADDRESS']}/v1{RULES}").text
        told = "\n".join(line for line in lines if "call_denied" not in line)
        return f"wanted {status}, had {seen[-5:]}; Consul has {rules}\n{told}"

    eventually(answered, within_s, explain)


def write(consul: httpx.Client, entry: dict[str, Any]) -> None:
    """Write an entry as soon as there is a leader to take it."""
    eventually(lambda: consul.put("/config", json=entry).status_code == httpx.codes.OK, 60)


def test_every_service_is_healthy_in_consul_and_a_question_is_answered(
    backend: Backend, agent: ConsulAgent, tmp_path: Path
) -> None:
    with agent.http() as consul:
        eventually(lambda: healthy(consul) == SERVICES, 60, lambda: str(healthy(consul)))
        for service in sorted(SERVICES):
            (entry,) = consul.get(f"/health/service/{service}").json()
            kinds = {check["Type"] for check in entry["Checks"] if check["ServiceID"]}
            assert kinds == {"ttl", "grpc"}, service
            assert entry["Service"]["Connect"]["Native"], service
    document = tmp_path / "plockton.md"
    document.write_text(TEXT)

    def answered() -> bool:  # also right after another test's outage
        question = "What does the harbour of Plockton have?"
        return (
            backend.plexus("ingest", str(document), check=False).returncode == 0
            and "palm trees" in backend.plexus("ask", question, check=False).stdout
        )

    eventually(answered, 120, backend.log_tail)


def test_a_denied_intention_shows_within_a_second_and_an_allowed_one_too(
    backend: Backend, agent: ConsulAgent
) -> None:
    with agent.http() as consul, backend.client() as client:
        shipped = consul.get(RULES).json()
        until(client, 200, backend)
        denied = {**shipped, "Sources": [{"Name": "edge", "Action": "deny"}]}
        latencies = []
        for entry, status in ((denied, 403), (shipped, 200)) * 3:
            assert consul.put("/config", json=entry).status_code == 200
            began = time.monotonic()
            until(client, status, backend)
            latencies.append(time.monotonic() - began)
        # The best of several, since the machine may be busy: a poll every few seconds could not do it.
        assert min(latencies) < 1.0, latencies
    log = (backend.state / "run/logs/inference.log").read_text()
    assert '"event": "call_denied"' in log
    assert '"rule": "edge -> inference"' in log


def test_while_consul_is_away_calls_go_on_and_denials_stay(backend: Backend, agent: ConsulAgent) -> None:
    with agent.http() as consul, backend.client() as client:
        shipped = consul.get(RULES).json()
        until(client, 200, backend)
        agent.pause()
        try:
            assert [embeds(client) for _ in range(20)] == [200] * 20
        finally:
            agent.resume()
        denied = {**shipped, "Sources": [{"Name": "edge", "Action": "deny"}]}
        write(consul, denied)
        until(client, 403, backend)
        agent.kill()
        assert [embeds(client) for _ in range(20)] == [403] * 20
        agent.start()
        write(consul, shipped)
        until(client, 200, backend)


def test_a_consul_that_lost_its_data_gets_everything_back(backend: Backend, agent: ConsulAgent) -> None:
    agent.kill()
    agent.wipe()
    agent.start()
    with agent.http() as consul, backend.client() as client:
        eventually(
            lambda: healthy(consul) == SERVICES, 90, lambda: f"{healthy(consul)}\n{backend.log_tail()}"
        )
        eventually(lambda: consul.get(RULES).status_code == 200, 60, backend.log_tail)
        until(client, 200, backend)
