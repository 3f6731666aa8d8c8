"""One real Consul agent a session, and clients of it; tests that break an agent start their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import httpx
import pytest

from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

KINDS = ("service-intentions", "service-defaults")


@pytest.fixture(scope="session")
def agent(consul_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    """A single server, shared by the tests of a worker."""
    with ConsulAgent(consul_program, tmp_path_factory.mktemp("consul")) as started:
        yield started


@pytest.fixture(scope="session")
def consul_url(request: pytest.FixtureRequest) -> str:
    """Of the agent named by the environment, else of one that is started."""
    given = os.environ.get("PLEXUS_TEST_CONSUL_URL")
    if given:
        return given.rstrip("/")
    started: ConsulAgent = request.getfixturevalue("agent")
    return started.url


def _empty(http: httpx.Client) -> None:
    for service in http.get("/agent/services").json():
        http.put(f"/agent/service/deregister/{service}").raise_for_status()
    for kind in KINDS:
        for entry in http.get(f"/config/{kind}").json():
            http.delete(f"/config/{kind}/{entry['Name']}").raise_for_status()
    http.delete("/kv/", params={"recurse": "true"}).raise_for_status()


@pytest.fixture
def http(consul_url: str) -> Iterator[httpx.Client]:
    """The agent's API as anyone uses it, on an agent that is empty before and after."""
    with httpx.Client(base_url=f"{consul_url}/v1", timeout=30) as client:
        _empty(client)
        yield client
        _empty(client)


@pytest.fixture
def config(consul_url: str, http: httpx.Client) -> ConsulConfig:
    del http
    return ConsulConfig(address=consul_url, wait_s=5)


@pytest.fixture
async def client(config: ConsulConfig) -> AsyncIterator[ConsulClient]:
    """The client under test."""
    async with ConsulClient(config) as opened:
        yield opened


@pytest.fixture
def dns_port(agent: ConsulAgent) -> int:
    return agent.ports["dns"]
