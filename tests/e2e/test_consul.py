"""The whole backend with a real Consul in place of its own registry, authority and rules."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from services.runtime.config import project_file
from tests.e2e.backend import PLEXUS, Backend, eventually
from tests.models import model_folder
from tests.ports import free_port
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]
SERVICES = {"control", "vectors", "storage", "search", "inference", "queueing", "knowledge", "edge"}
WITHIN_S = 120
TEXT = "The harbour of Plockton has palm trees."
EMBED = {"model": "minilm", "input": "hello"}
RULES = "/config/service-intentions/inference"
SHIPPED = yaml.safe_load(project_file("consul/intentions/inference.yaml").read_text())
DENIED = {**SHIPPED, "Sources": [{"Name": "edge", "Action": "deny"}]}


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


def until(client: httpx.Client, status: int, backend: Backend, within_s: float = WITHIN_S) -> None:
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
    eventually(lambda: consul.put("/config", json=entry).status_code == httpx.codes.OK, WITHIN_S)


@pytest.fixture(scope="module")
def edge(backend: Backend) -> Iterator[httpx.Client]:
    """Asks the edge."""
    with backend.client() as client:
        yield client


@pytest.fixture
def client(edge: httpx.Client, backend: Backend, agent: ConsulAgent) -> httpx.Client:
    """The same; at the start the rules are those shipped, whatever a test before left."""
    with agent.http() as consul:
        write(consul, SHIPPED)
    until(edge, 200, backend)
    return edge


def all_healthy(consul: httpx.Client, backend: Backend) -> None:
    eventually(
        lambda: healthy(consul) >= SERVICES, WITHIN_S, lambda: f"{healthy(consul)}\n{backend.log_tail()}"
    )


def checks(consul: httpx.Client, service: str) -> tuple[dict[str, Any], set[str]]:
    """The one instance of a service, and the kinds of its checks."""
    (entry,) = consul.get(f"/health/service/{service}").json()
    return entry["Service"], {check["Type"] for check in entry["Checks"] if check["ServiceID"]}


def test_every_service_is_healthy_in_consul(backend: Backend, agent: ConsulAgent) -> None:
    with agent.http() as consul:
        all_healthy(consul, backend)
        for name in sorted(SERVICES - {"edge"}):
            service, kinds = checks(consul, name)
            assert kinds == {"ttl", "grpc"}, name
            assert service["Connect"]["Native"], name
        service, kinds = checks(consul, "edge")
        assert kinds == {"ttl", "tcp"}
        assert service["Port"] == backend.port
        assert not service["Connect"].get("Native")  # it takes HTTP, no mTLS


def test_a_program_that_joined_is_in_consul_while_its_port_answers(
    backend: Backend, agent: ConsulAgent
) -> None:
    port = free_port()
    program = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    joining = [*PLEXUS, "join", "--service", "orders", "--port", str(port), "--", *program]
    environment = {"PLEXUS_STATE": str(backend.state), **backend.environment}
    with (
        agent.http() as consul,
        subprocess.Popen(joining, env=environment, stderr=subprocess.DEVNULL) as joined,
    ):
        try:
            eventually(lambda: "orders" in healthy(consul), WITHIN_S, backend.log_tail)
            service, kinds = checks(consul, "orders")
            assert (service["Port"], kinds) == (port, {"ttl", "tcp"})
        finally:
            joined.terminate()
        assert joined.wait(WITHIN_S) is not None
        eventually(lambda: consul.get("/health/service/orders").json() == [], WITHIN_S)


def test_a_question_is_answered(backend: Backend, client: httpx.Client, tmp_path: Path) -> None:
    del client
    document = tmp_path / "plockton.md"
    document.write_text(TEXT)

    def answered() -> bool:  # also right after another test's outage
        question = "What does the harbour of Plockton have?"
        return (
            backend.plexus("ingest", str(document), check=False).returncode == 0
            and "palm trees" in backend.plexus("ask", question, check=False).stdout
        )

    eventually(answered, WITHIN_S, backend.log_tail)


def test_a_changed_intention_applies_and_a_denial_is_logged(
    backend: Backend, agent: ConsulAgent, client: httpx.Client
) -> None:
    with agent.http() as consul:
        write(consul, DENIED)
        until(client, 403, backend)
        write(consul, SHIPPED)
        until(client, 200, backend)
    log = (backend.state / "run/logs/inference.log").read_text()
    assert '"event": "call_denied"' in log
    assert '"rule": "edge -> inference"' in log


def test_while_consul_is_silent_calls_go_on(
    backend: Backend, agent: ConsulAgent, client: httpx.Client
) -> None:
    agent.pause()
    try:
        assert [embeds(client) for _ in range(20)] == [200] * 20
    finally:
        agent.resume()
    with agent.http() as consul:
        write(consul, DENIED)
    until(client, 403, backend)


def test_while_consul_is_dead_a_denial_stays(
    backend: Backend, agent: ConsulAgent, client: httpx.Client
) -> None:
    with agent.http() as consul:
        write(consul, DENIED)
        until(client, 403, backend)
        agent.kill()
        try:
            assert [embeds(client) for _ in range(20)] == [403] * 20
        finally:
            agent.start()
        write(consul, SHIPPED)
    until(client, 200, backend)


def test_a_consul_that_lost_its_data_gets_everything_back(
    backend: Backend, agent: ConsulAgent, client: httpx.Client
) -> None:
    agent.kill()
    agent.wipe()
    agent.start()
    with agent.http() as consul:
        all_healthy(consul, backend)
        eventually(lambda: consul.get(RULES).status_code == 200, WITHIN_S, backend.log_tail)
    until(client, 200, backend)
