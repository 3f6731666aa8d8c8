"""The Compose file's services, run as plain processes on real servers: what it promises holds."""

from __future__ import annotations

import base64
import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from services.mesh.consul import verdict
from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from services.mesh.trust.consul import ConnectCertificateSource, _csr, sign
from services.mesh.trust.names import alternative_names
from services.runtime.config import Settings
from services.runtime.errors import PermissionDeniedError
from tests.e2e.backend import eventually
from tests.production.management import Management, methods
from tests.production.plain import Production

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.production.compose import Project
    from tests.servers.postgres import PostgresServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("production"),
]
WITHIN_S = 180.0


@pytest.fixture(scope="module")
def production(
    project: Project,
    secrets: Path,
    consul_program: Path,
    rabbitmq_program: Path,
    postgres: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Production]:
    folder = tmp_path_factory.mktemp("plain")
    copied = shutil.copytree(secrets, folder / "secrets")
    made = Production(project, copied, folder, consul=consul_program, rabbitmq=rabbitmq_program)
    made.use_postgres(postgres)
    with made:
        yield made
        statuses = made.stop()
        assert set(statuses.values()) == {0}, f"{statuses}\n{made.explain()}"


@pytest.fixture(scope="module")
def edge(production: Production) -> httpx.Client:
    client = production.edge()
    for path, body in (
        ("/v1/topics", {"topic": "parcels"}),
        ("/v1/subscriptions", {"name": "sorting", "topic": "parcels", "ackDeadline": "600s"}),
    ):
        assert client.post(path, json=body).status_code == httpx.codes.OK, production.explain()
    return client


def publish(edge: httpx.Client, text: str) -> str:
    """Publish until it is confirmed; the deduplication id makes that one message."""
    data = {"data": base64.b64encode(text.encode()).decode(), "dedupId": text}
    answers: list[httpx.Response] = []

    def published() -> bool:
        answers.append(edge.post("/v1/topics/parcels:publish", json={"messages": [data]}))
        return answers[-1].status_code == httpx.codes.OK

    eventually(published, WITHIN_S, lambda: answers[-1].text)
    return str(answers[-1].json()["messageIds"][0])


def pull(edge: httpx.Client, wanted: set[str]) -> None:
    """Pull and acknowledge until these have come."""
    missing = set(wanted)
    seen: list[Any] = []

    def pulled() -> bool:
        answer = edge.post("/v1/subscriptions/sorting:pull", json={"maxMessages": 10, "wait": "2s"})
        seen.append(answer.text)
        for delivery in answer.json()["deliveries"] if answer.is_success else []:
            missing.discard(base64.b64decode(delivery["data"]).decode())
            edge.post("/v1/subscriptions/sorting:acknowledge", json={"ackIds": [delivery["ackId"]]})
        return not missing

    eventually(pulled, WITHIN_S, lambda: f"{missing} did not come: {seen[-3:]}")


def test_the_health_check_of_the_image_says_so(production: Production) -> None:
    done = production.check_health("knowledge")
    assert (done.returncode, done.stdout.strip()) == (0, "passing"), done


def test_the_health_check_fails_for_what_does_not_run_on_the_node(production: Production) -> None:
    inference, storage = (production.project.services[name] for name in ("inference", "storage"))
    assert inference.node != storage.node
    healthy, text = verdict.ask(verdict.instance_of(inference.command), production.environment(storage))
    assert not healthy, text


def test_a_message_and_an_object_go_through_the_edge_and_a_killed_replica_stops_neither(
    production: Production, edge: httpx.Client
) -> None:
    publish(edge, "before")
    pull(edge, {"before"})
    production.kill("queueing-a")
    for number in range(10):
        publish(edge, f"after-{number}")
    pull(edge, {f"after-{number}" for number in range(10)})
    path = "/v1/buckets/user-uploads/objects/production.txt"
    assert edge.put(path, content=b"kept").is_success
    assert edge.get(path).content == b"kept"
    production.serve("queueing-a")
    production.wait_healthy()


def test_every_method_of_queueing_is_called_over_rest(production: Production) -> None:
    management = Management(production.edge("admin"))
    management.run()
    assert management.called == methods()


def test_the_edge_speaks_tls_and_nothing_else(production: Production) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{production.edge_port}/healthz")


def test_consul_tells_nothing_without_a_token_and_shows_its_ui(production: Production) -> None:
    anyone = production.consul("consul")
    assert anyone.get("/catalog/services").json() == {}
    assert anyone.get("/agent/self").status_code == httpx.codes.FORBIDDEN
    page = anyone.get(f"https://127.0.0.1:{production.agents['consul']}/ui/")
    assert page.status_code == httpx.codes.OK
    assert "Consul" in page.text
    manager = production.consul("consul", "management")
    told = manager.get("/catalog/services").json()
    assert set(told) >= {service.process for service in production.project.processes()}
    nodes = {node["Node"] for node in manager.get("/catalog/nodes").json()}
    assert nodes == {"consul", "node-a", "node-b"}
    replicas = manager.get("/health/service/queueing?passing").json()
    assert {each["Node"]["Node"] for each in replicas} == {"node-a", "node-b"}


async def test_a_service_s_token_is_for_that_service_alone(production: Production, tmp_path: Path) -> None:
    vectors = production.consul("node-b", "vectors")
    assert vectors.put("/agent/service/register", json={"Name": "storage"}).status_code == 403
    assert vectors.put("/kv/plexus/policies/storage", content=b"x").status_code == 403
    assert vectors.get("/connect/intentions/match?by=destination&name=storage").status_code == 403
    environment = production.environment(production.project.services["vectors"])
    config = Settings(environment).section("consul", ConsulConfig)
    async with ConsulClient(config) as client:
        own = await ConnectCertificateSource(tmp_path, "vectors", client).obtain()
        foreign = alternative_names(own.spiffe_id.replace("vectors", "storage"), "storage", "127.0.0.1")
        with pytest.raises(PermissionDeniedError):
            await sign(config, _csr(foreign, ec.generate_private_key(ec.SECP256R1())))


def test_the_control_plane_of_a_node_shows_the_replicas_of_both(production: Production) -> None:
    told = production.plexus("control-a", "mesh", "explain", "queueing", "--json")
    for name in ("queueing-a", "queueing-b"):
        assert production.environment(production.project.services[name])["PLEXUS_SERVER__HOST"] in told


def test_applying_the_policies_again_changes_nothing(production: Production) -> None:
    before = production.consul("consul", "management").get("/acl/tokens").json()
    assert production.apply_acl() == ""
    assert production.consul("consul", "management").get("/acl/tokens").json() == before


def test_rabbitmq_has_no_default_user_and_the_operator_only_looks(production: Production) -> None:
    with production.rabbit.http() as operator:
        assert operator.get("/queues/plexus").is_success
        assert operator.put("/queues/plexus/mine", json={}).status_code in {401, 403}
        url = operator.base_url.copy_with(username="guest", password="guest")
        assert httpx.get(f"{url}whoami").status_code == httpx.codes.UNAUTHORIZED
