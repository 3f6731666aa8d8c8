"""The registry in a real Consul: what others see of it, and that the agent's verdict counts."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dns.message
import dns.query
import dns.rdatatype
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from services.mesh.consul.client import ConsulClient
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.registry.domain import Health
from services.runtime.errors import InvalidArgumentError
from tests.contracts.registry import LEASE_S, RegistryContract, instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx

    from services.mesh.consul.config import ConsulConfig
    from services.mesh.registry.domain import Instance, Registry

WITHIN_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def registry(client: ConsulClient) -> ConsulRegistry:
    return ConsulRegistry(client)


class TestConsulRegistry(RegistryContract):
    @pytest.fixture
    def registry(self, client: ConsulClient) -> Registry:
        return ConsulRegistry(client)


async def until(registry: Registry, wanted: Callable[[list[Instance]], bool], service: str = "") -> None:
    async with asyncio.timeout(WITHIN_S):
        async for instances in registry.watch(service):
            if wanted(instances):
                return


async def eventually(found: Callable[[], Any], wanted: object) -> None:
    """Ask until the answer is as wanted."""
    seen: Any = None
    try:
        async with asyncio.timeout(WITHIN_S):
            while (seen := await asyncio.to_thread(found)) != wanted:  # noqa: ASYNC110 - asks from outside
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"wanted {wanted}, got {seen}")


@pytest.fixture
async def served() -> AsyncIterator[tuple[HealthServicer, str]]:
    """A gRPC health server without TLS, and its address."""
    server = grpc.aio.server()
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield health, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_the_watch_of_everything_tells_joins_moves_and_ends(registry: ConsulRegistry) -> None:
    await registry.register(instance(), lease_s=LEASE_S)
    other = instance(service="storage")
    await until(registry, lambda now: now == [instance()])
    watch = registry.watch()
    async with asyncio.timeout(WITHIN_S):
        assert await anext(watch) == [instance()]
        await registry.register(other, lease_s=LEASE_S)
        while await anext(watch) != [other, instance()]:
            pass
        moved = replace(other, port=7777)
        await registry.register(moved, lease_s=LEASE_S)
        while await anext(watch) != [moved, instance()]:
            pass
        await registry.deregister(other.id)
        while await anext(watch) != [instance()]:
            pass
    await watch.aclose()  # type: ignore[attr-defined]  # it is a generator


async def test_the_agent_asks_the_instance_for_its_health(
    config: ConsulConfig, served: tuple[HealthServicer, str]
) -> None:
    health, address = served
    await health.set("", SERVING)
    async with ConsulClient(config.model_copy(update={"check_interval_s": 0.5})) as client:
        registry = ConsulRegistry(client)
        checked = replace(instance(), meta={"health": address})
        await registry.register(checked, lease_s=LEASE_S)
        assert await registry.instances("vectors") == [checked]
        await health.set("", NOT_SERVING)
        await until(registry, lambda now: [entry.health for entry in now] == [Health.NOT_SERVING], "vectors")
        await health.set("", SERVING)
        await until(registry, lambda now: now == [checked], "vectors")


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_an_instance_whose_check_fails_for_a_minute_is_removed(
    config: ConsulConfig, http: httpx.Client
) -> None:
    async with ConsulClient(config.model_copy(update={"check_interval_s": 1.0})) as client:
        registry = ConsulRegistry(client)
        await registry.register(replace(instance(), meta={"health": "127.0.0.1:1"}), lease_s=600)
        assert "vectors-1" in http.get("/agent/services").json()
        async with asyncio.timeout(300):  # Consul looks every half minute or so
            while "vectors-1" in http.get("/agent/services").json():  # noqa: ASYNC110 - asks from outside
                await asyncio.sleep(0.5)


async def test_by_default_an_instance_is_checked_every_ten_seconds(
    registry: ConsulRegistry, http: httpx.Client
) -> None:
    await registry.register(replace(instance(), meta={"health": "127.0.0.1:1"}), lease_s=LEASE_S)
    checks = http.get("/agent/checks").json()
    assert (checks["probe:vectors-1"]["Type"], checks["probe:vectors-1"]["Interval"]) == ("grpc", "10s")
    assert checks["lease:vectors-1"]["Type"] == "ttl"


async def test_a_process_that_comes_after_a_dead_one_counts_at_once(
    config: ConsulConfig, served: tuple[HealthServicer, str]
) -> None:
    health, address = served
    await health.set("", SERVING)
    async with ConsulClient(config.model_copy(update={"check_interval_s": 0.5})) as client:
        registry = ConsulRegistry(client)
        await registry.register(replace(instance(), meta={"health": "127.0.0.1:1"}), lease_s=LEASE_S)
        await until(registry, lambda now: [entry.health for entry in now] == [Health.NOT_SERVING], "vectors")
    registry = ConsulRegistry(client)
    async with client:
        successor = replace(instance(), port=4100, meta={"health": address})
        await registry.register(successor, lease_s=LEASE_S)
        assert await registry.instances("vectors") == [successor]


async def test_a_lease_that_is_renewed_after_it_ran_out_counts_again(registry: ConsulRegistry) -> None:
    await registry.register(instance(), lease_s=0.2)
    await until(registry, lambda now: now == [], "vectors")
    await registry.register(replace(instance(), port=4100), lease_s=LEASE_S)
    await until(registry, lambda now: [entry.port for entry in now] == [4100], "vectors")


async def test_health_goes_to_and_fro_and_a_new_registration_ends_the_maintenance(
    registry: ConsulRegistry,
) -> None:
    await registry.register(instance(), lease_s=LEASE_S)
    for health in (Health.NOT_SERVING, Health.SERVING, Health.DRAINING, Health.SERVING, Health.DRAINING):
        await registry.keep_alive("vectors-1", health)
        wanted = [replace(instance(), health=health)]
        await until(registry, lambda now, wanted=wanted: now == wanted, "vectors")  # type: ignore[misc]
    await registry.register(instance(), lease_s=LEASE_S)
    assert await registry.instances("vectors") == [instance()]


async def test_draining_is_maintenance_with_its_reason(registry: ConsulRegistry, http: httpx.Client) -> None:
    await registry.register(instance(), lease_s=LEASE_S)
    await registry.keep_alive("vectors-1", Health.DRAINING)
    (entry,) = http.get("/health/service/vectors").json()
    notes = {check["CheckID"]: check["Notes"] for check in entry["Checks"]}
    assert notes["_service_maintenance:vectors-1"] == "draining"
    assert http.get("/health/service/vectors", params={"passing": ""}).json() == []


async def test_what_no_client_could_call_is_left_out(registry: ConsulRegistry, http: httpx.Client) -> None:
    http.put("/agent/service/register", json={"Name": "vectors", "ID": "a", "Address": "db.example.org"})
    http.put(
        "/agent/service/register", json={"Name": "bad name!", "ID": "b", "Address": "127.0.0.1", "Port": 1}
    )
    await registry.register(instance(), lease_s=LEASE_S)
    assert await registry.instances() == [instance()]


async def test_an_instance_of_another_tool_counts_with_its_weight_and_a_warning_with_the_lower(
    registry: ConsulRegistry, http: httpx.Client
) -> None:
    by_hand = {
        "Name": "vectors",
        "ID": "go-1",
        "Address": "127.0.0.1",
        "Port": 9,
        "Meta": {"version": "2.0"},
        "Weights": {"Passing": 10, "Warning": 3},
        "Check": {"CheckID": "own", "TTL": "300s", "Status": "passing"},
    }
    http.put("/agent/service/register", json=by_hand).raise_for_status()
    (seen,) = await registry.instances("vectors")
    assert (seen.id, seen.version, seen.zone, seen.weight) == ("go-1", "2.0", "local", 10)
    http.put("/agent/check/warn/own").raise_for_status()
    await until(registry, lambda now: [(e.weight, e.health) for e in now] == [(3, Health.SERVING)], "vectors")


async def test_meta_may_not_hide_a_field(registry: ConsulRegistry) -> None:
    with pytest.raises(InvalidArgumentError):
        await registry.register(replace(instance(), meta={"zone": "b"}), lease_s=LEASE_S)


async def test_a_registration_comes_back_after_the_agent_forgot_it(
    registry: ConsulRegistry, http: httpx.Client
) -> None:
    registration = Registration(registry, instance(), lease_s=0.6)
    task = asyncio.create_task(registration.run())
    try:
        await asyncio.wait_for(registration.registered.wait(), WITHIN_S)
        http.put("/agent/service/deregister/vectors-1").raise_for_status()
        await until(registry, lambda now: [entry.id for entry in now] == ["vectors-1"], "vectors")
    finally:
        task.cancel()


def ask(name: str, kind: str, port: int) -> list[str]:
    query = dns.message.make_query(name, kind)
    answer = dns.query.udp(query, "127.0.0.1", port=port, timeout=10)
    wanted = dns.rdatatype.from_text(kind)
    return sorted(str(item) for rows in answer.answer if rows.rdtype == wanted for item in rows)


@pytest.mark.parametrize("service", ["vectors", "storage", "search", "inference", "queueing", "knowledge"])
async def test_dns_answers_for_every_service(registry: ConsulRegistry, dns_port: int, service: str) -> None:
    await registry.register(instance(service=service), lease_s=LEASE_S)
    name = f"{service}.service.consul"
    await eventually(lambda: ask(name, "A", dns_port), ["127.0.0.1"])
    (row,) = ask(name, "SRV", dns_port)
    assert row.split()[:3] == ["1", "1", "4001"]
    assert ask(f"a.{name}", "A", dns_port) == ["127.0.0.1"]
    assert ask(f"{service}.connect.consul", "A", dns_port) == ["127.0.0.1"]
    await registry.keep_alive(f"{service}-1", Health.DRAINING)
    await eventually(lambda: ask(name, "A", dns_port), [])


async def test_the_pages_of_the_ui_have_what_they_show(
    registry: ConsulRegistry, client: ConsulClient, consul_url: str, http: httpx.Client
) -> None:
    await registry.register(instance(), lease_s=LEASE_S)
    await client.put(
        "/v1/config",
        {
            "Kind": "service-intentions",
            "Name": "vectors",
            "Sources": [{"Name": "knowledge", "Action": "allow"}],
        },
    )
    await client.api.kv.put("plexus/policies/vectors", "lb: round_robin")
    base = consul_url
    page = http.get(f"{base}/ui/")
    assert page.status_code == 200
    assert "<title>Consul" in page.text
    rows = {row["Name"]: row for row in http.get("/internal/ui/services", params={"dc": "dc1"}).json()}
    assert (rows["vectors"]["InstanceCount"], rows["vectors"]["ChecksPassing"]) == (1, 2)
    assert rows["vectors"]["ConnectNative"]
    (entry,) = http.get("/health/service/vectors", params={"dc": "dc1"}).json()
    assert {check["Status"] for check in entry["Checks"]} == {"passing"}
    (intention,) = http.get("/connect/intentions", params={"dc": "dc1"}).json()
    assert (intention["SourceName"], intention["Action"]) == ("knowledge", "allow")
    assert http.get("/kv/plexus/", params={"keys": "", "separator": "/"}).json() == ["plexus/policies/"]
    (value,) = http.get("/kv/plexus/policies/vectors").json()
    assert base64.b64decode(value["Value"]) == b"lb: round_robin"
    (node,) = http.get("/internal/ui/nodes", params={"dc": "dc1"}).json()
    assert {check["Status"] for check in node["Checks"]} == {"passing"}
    topology = http.get("/internal/ui/service-topology/vectors", params={"dc": "dc1", "kind": ""})
    assert topology.status_code == 200
