"""What surprised us about Consul, shown on a real one; and that nothing of ours falls for it."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc.aio
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from structlog.testing import capture_logs

from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from services.mesh.consul.intentions import watch_intentions
from services.mesh.consul.kv import KeyValues
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.trust.consul import read_roots
from services.runtime.errors import FailedPreconditionError, PermissionDeniedError, ResourceExhaustedError
from tests.contracts.registry import LEASE_S, instance
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

WITHIN_S = 90.0
READ = 'service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }'
WRITE = READ.replace('service_prefix "" { policy = "read" }', 'service_prefix "" { policy = "write" }')


@pytest.fixture(scope="module")
def guarded(consul_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    """A server with ACLs: deny by default, but intentions allow by default."""
    secret = str(uuid.uuid4())
    tokens = {"initial_management": secret, "agent": secret}
    config = {
        "acl": {"enabled": True, "default_policy": "deny", "tokens": tokens},
        "default_intention_policy": "allow",
    }
    folder = tmp_path_factory.mktemp("guarded")
    with ConsulAgent(consul_program, folder, config=config, token=secret) as agent:
        yield agent


@pytest.fixture
def operator(guarded: ConsulAgent) -> Iterator[httpx.Client]:
    with guarded.http() as http:
        yield http


def config_of(agent: ConsulAgent, token: str | None = None, **more: Any) -> ConsulConfig:
    return ConsulConfig.model_validate({"address": agent.url, "token": token, "wait_s": 2, **more})


class Token:
    """A token with a policy that can be changed."""

    def __init__(self, operator: httpx.Client, rules: str) -> None:
        self._operator = operator
        self._name = f"test-{uuid.uuid4()}"
        self.policy = operator.put("/acl/policy", json={"Name": self._name, "Rules": rules}).json()["ID"]
        made = operator.put("/acl/token", json={"Policies": [{"ID": self.policy}]}).json()
        self.secret: str = made["SecretID"]
        self._accessor: str = made["AccessorID"]

    def may(self, rules: str) -> None:
        body = {"Name": self._name, "Rules": rules}
        self._operator.put(f"/acl/policy/{self.policy}", json=body).raise_for_status()

    def delete(self) -> None:
        self._operator.delete(f"/acl/token/{self._accessor}").raise_for_status()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():  # noqa: ASYNC110 - asks from outside
            await asyncio.sleep(0.05)


async def refused(logs: list[Any], path: str) -> None:
    """Wait until the watch of a path has said that it does not believe what it is told, or is refused."""
    failed = {"CONSUL_NOT_BELIEVED", "CONSUL_DENIED"}
    await until(lambda: [e for e in logs if e.get("path") == path and e.get("reason") in failed])


async def test_1_a_watch_whose_token_lost_its_rights_is_told_of_nothing_and_tells_nothing(
    guarded: ConsulAgent, operator: httpx.Client
) -> None:
    token = Token(operator, READ)
    async with (
        ConsulClient(config_of(guarded, guarded.token)) as owner,
        ConsulClient(config_of(guarded, token.secret)) as client,
    ):
        await ConsulRegistry(owner).register(instance(), lease_s=600)
        try:
            watched: Any = ConsulRegistry(client).watch("vectors")
            everything: Any = ConsulRegistry(client).watch()
            async with asyncio.timeout(WITHIN_S):
                assert await anext(watched) == [instance()]
                while await anext(everything) != [instance()]:
                    pass
            nexts = [asyncio.ensure_future(anext(each)) for each in (watched, everything)]
            with capture_logs() as logs:
                token.may("")
                await refused(logs, "/v1/health/service/vectors")
                await refused(logs, "/v1/catalog/services")
            assert not any(waiting.done() for waiting in nexts)
            token.may(READ)
            changed = replace(
                instance(), version="2"
            )  # in place: at another port it would be gone in between
            await ConsulRegistry(owner).register(changed, lease_s=600)
            async with asyncio.timeout(WITHIN_S):
                assert await nexts[0] == [changed]
                assert await nexts[1] == [changed]
            await everything.aclose()
            await watched.aclose()
        finally:
            await ConsulRegistry(owner).deregister("vectors-1")


async def test_2_without_a_token_everything_looks_empty_so_one_is_demanded(guarded: ConsulAgent) -> None:
    with httpx.Client(base_url=guarded.url) as http:
        bare = http.get("/v1/catalog/services")
    assert (bare.status_code, bare.json()) == (200, {})
    assert "X-Consul-Results-Filtered-By-ACLs" not in bare.headers
    async with ConsulClient(config_of(guarded)) as nobody:
        with pytest.raises(FailedPreconditionError, match=r"consul\.token"):
            await nobody.check_access()
    async with ConsulClient(config_of(guarded, str(uuid.uuid4()))) as stranger:
        with pytest.raises(PermissionDeniedError):
            await stranger.check_access()
    async with ConsulClient(config_of(guarded, guarded.token)) as known:
        await known.check_access()


async def test_2_an_environment_variable_does_not_replace_the_token(
    guarded: ConsulAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", str(uuid.uuid4()))
    async with ConsulClient(config_of(guarded, guarded.token)) as client:
        assert await KeyValues(client).put("plexus/a", b"1")


@pytest.fixture
def own(consul_program: Path, tmp_path: Path) -> Iterator[ConsulAgent]:
    with ConsulAgent(consul_program, tmp_path) as started:
        yield started


@pytest.fixture
async def client(own: ConsulAgent) -> AsyncIterator[ConsulClient]:
    async with ConsulClient(config_of(own)) as opened:
        yield opened


async def test_3_after_a_restore_the_index_is_of_the_future_and_the_watch_still_sees_it(
    own: ConsulAgent, client: ConsulClient
) -> None:
    store = KeyValues(client)
    await store.put("plexus/a", b"old")
    with own.http() as http:
        snapshot = http.get("/snapshot").content
        watched: Any = store.watch("plexus/")
        async with asyncio.timeout(WITHIN_S):
            assert await anext(watched) == {"plexus/a": b"old"}
            for number in range(20):
                await store.put("plexus/a", str(number).encode())
            while await anext(watched) != {"plexus/a": b"19"}:
                pass
            http.put("/snapshot", content=snapshot, timeout=60).raise_for_status()
            while await anext(watched) != {"plexus/a": b"old"}:
                pass
            await store.put("plexus/a", b"new")
            assert await anext(watched) == {"plexus/a": b"new"}
        await watched.aclose()


async def test_4_a_wiped_server_comes_back_with_another_authority_and_a_small_index(
    own: ConsulAgent, client: ConsulClient
) -> None:
    before = await read_roots(client)
    index = (await client.request("GET", "/v1/connect/ca/roots")).index
    own.kill()
    own.wipe()
    await asyncio.to_thread(own.start)
    again = await read_roots(client)
    assert again.trust_domain != before.trust_domain
    # So near the old index that it tells nothing: bodies are compared (test_hostile, test_outages).
    assert abs((await client.request("GET", "/v1/connect/ca/roots")).index - index) < 10


async def test_5_deleting_its_token_freezes_an_instance_and_the_instance_is_told(
    guarded: ConsulAgent, operator: httpx.Client
) -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    token = Token(operator, WRITE)
    async with ConsulClient(config_of(guarded, token.secret, check_interval_s=0.5)) as client:
        registry = ConsulRegistry(client)
        probed = replace(instance(5), meta={"health": f"127.0.0.1:{port}"})
        await registry.register(probed, lease_s=LEASE_S)
        try:
            token.delete()
            await server.stop(0)
            check = "probe:vectors-5"
            await until(lambda: operator.get("/agent/checks").json()[check]["Status"] == "critical")
            (entry,) = operator.get("/health/service/vectors").json()
            catalogue = {item["CheckID"]: item["Status"] for item in entry["Checks"]}
            assert catalogue[check] == "passing"  # so callers need outlier detection of their own
            with pytest.raises(PermissionDeniedError):
                await registry.keep_alive("vectors-5", probed.health)
        finally:
            operator.put("/agent/service/deregister/vectors-5")
            node = {"Node": "server", "ServiceID": "vectors-5"}
            operator.put("/catalog/deregister", json=node).raise_for_status()


async def test_6_a_wiped_client_agent_leaves_a_ghost_that_a_deregistration_of_its_node_lays(
    consul_program: Path, own: ConsulAgent, tmp_path: Path
) -> None:
    with ConsulAgent(consul_program, tmp_path, name="edge-host", join=own) as agent, own.http() as http:
        async with ConsulClient(config_of(agent)) as client:
            await ConsulRegistry(client).register(instance(), lease_s=600)
            await until(lambda: http.get("/health/service/vectors", params={"passing": ""}).json())
            agent.kill()
            agent.wipe()
            await asyncio.to_thread(agent.start)
            assert http.get("/catalog/service/vectors").json()  # nobody's any more, and still listed
            await until(lambda: "reserved by node" in agent.log())
            http.put("/catalog/deregister", json={"Node": "edge-host"}).raise_for_status()
        async with ConsulClient(config_of(agent)) as client, ConsulClient(config_of(own)) as reader:
            moved = replace(instance(), port=4712)
            renewing = asyncio.create_task(Registration(ConsulRegistry(client), moved, lease_s=30).run())
            watched: Any = ConsulRegistry(reader).watch("vectors")
            async with asyncio.timeout(WITHIN_S):
                while [entry.port for entry in await anext(watched)] != [4712]:
                    pass
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await watched.aclose()


@pytest.fixture
def narrow(consul_program: Path, tmp_path: Path) -> Iterator[ConsulAgent]:
    """Takes four connections of a host."""
    config = {"limits": {"http_max_conns_per_client": 4}}
    with ConsulAgent(consul_program, tmp_path, config=config) as started:
        yield started


async def test_7_and_8_an_agent_without_a_free_connection_is_waited_for(narrow: ConsulAgent) -> None:
    async with ConsulClient(config_of(narrow)) as client:
        await KeyValues(client).put("plexus/a", b"1")
        index = (await client.request("GET", "/v1/kv/plexus/a")).index
    async with ConsulClient(config_of(narrow)) as client:
        query = [("index", index), ("wait", "20s")]

        async def poll() -> None:
            await client.request("GET", "/v1/kv/plexus/a", query, timeout_s=60)

        polls: list[asyncio.Task[None]] = []
        async with asyncio.timeout(WITHIN_S):
            while not any(task.done() for task in polls):
                polls.append(asyncio.create_task(poll()))
                await asyncio.wait(polls, timeout=0.3, return_when=asyncio.FIRST_COMPLETED)
        (limited,) = [task for task in polls if task.done()]
        assert isinstance(limited.exception(), ResourceExhaustedError)
        for task in polls:
            task.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        # The polls are gone and their connections closed, and yet the agent keeps the places until they end.
        watched: Any = KeyValues(client).watch("plexus/")
        with capture_logs() as logs:
            async with asyncio.timeout(WITHIN_S):
                assert await anext(watched) == {"plexus/a": b"1"}
        assert [entry["reason"] for entry in logs if entry["event"] == "consul_watch_failed"] == [
            "CONSUL_BUSY"
        ]
        await watched.aclose()


async def test_9_hundreds_of_watches_do_not_hold_up_a_plain_request(client: ConsulClient) -> None:
    async def follow(number: int) -> None:
        async for _ in KeyValues(client).watch(f"plexus/{number}/"):
            first.release()

    first = asyncio.Semaphore(0)
    watches = [asyncio.create_task(follow(number)) for number in range(300)]
    try:
        async with asyncio.timeout(WITHIN_S):
            for _ in watches:
                await first.acquire()
            # All of them wait in Consul now, each on a connection of its own.
            assert await client.get("/v1/status/leader")
            await KeyValues(client).put("plexus/299/a", b"1")
            await first.acquire()
    finally:
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


async def test_10_the_agents_own_leaf_names_no_host_and_has_a_key_that_java_does_not_read(
    client: ConsulClient,
) -> None:
    leaf = await client.get("/v1/agent/connect/ca/leaf/vectors")
    cert = x509.load_pem_x509_certificate(leaf["CertPEM"].encode())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []
    assert leaf["PrivateKeyPEM"].startswith("-----BEGIN EC PRIVATE KEY-----")
    # Ours: test_connect_ca.


async def test_11_consul_contradicts_itself_on_the_default_and_here_it_is_always_deny(
    guarded: ConsulAgent, operator: httpx.Client
) -> None:
    pair = {"source": "web", "destination": "vectors"}
    checked = operator.get("/connect/intentions/check", params=pair).json()["Allowed"]
    domain = operator.get("/connect/ca/roots").json()["TrustDomain"]
    caller = {"Target": "vectors", "ClientCertURI": f"spiffe://{domain}/ns/default/dc/dc1/svc/web"}
    authorized = operator.post("/agent/connect/authorize", json=caller).json()["Authorized"]
    assert (checked, authorized) == (False, True)
    async with ConsulClient(config_of(guarded, guarded.token)) as client:
        watched: Any = watch_intentions(client, "vectors")
        table = await asyncio.wait_for(anext(watched), WITHIN_S)
        await watched.aclose()
    assert not table.decide("web", "vectors", "/x").allowed


async def test_12_errors_carry_an_index_that_is_none(guarded: ConsulAgent) -> None:
    with httpx.Client(base_url=guarded.url) as http:
        query = {"by": "destination", "name": "vectors"}
        answer = http.get("/v1/connect/intentions/match", params=query)
    assert (answer.status_code, answer.headers["X-Consul-Index"]) == (403, "1")
    async with ConsulClient(config_of(guarded)) as nobody:
        with pytest.raises(PermissionDeniedError):
            await nobody.get("/v1/connect/intentions/match", ("by", "destination"), ("name", "vectors"))
    # That a watch takes nothing from it: test_hostile.
