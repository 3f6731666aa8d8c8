"""An agent that speaks TLS only and demands certificates, over HTTP and over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.trust.consul import ConnectCertificateSource
from services.mesh.trust.local import LocalCertificateSource
from services.runtime.errors import InvalidArgumentError, UnavailableError
from tests.contracts.registry import LEASE_S, instance
from tests.ports import free_port
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.mesh.trust.domain import Identity


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A certificate for localhost, its key and its authority; the agent and its clients share it."""
    return LocalCertificateSource(tmp_path_factory.mktemp("pki"), "agent", 3600).ensure()


@pytest.fixture(scope="module")
def agent(
    consul_program: Path, files: Identity, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ConsulAgent]:
    paths = {
        "ca_file": str(files.ca_path),
        "cert_file": str(files.cert_path),
        "key_file": str(files.key_path),
        "verify_incoming": True,
    }
    made = ConsulAgent(consul_program, tmp_path_factory.mktemp("tls"), config={"tls": {"defaults": paths}})
    made.config["tls"]["internal_rpc"] = {"verify_incoming": False}
    for kind in ("https", "grpc_tls"):
        made.ports[kind] = made.config["ports"][kind] = free_port()
    with made:
        yield made


@pytest.fixture
def config(agent: ConsulAgent, files: Identity) -> ConsulConfig:
    return ConsulConfig(
        address=f"https://localhost:{agent.ports['https']}",
        grpc_address=f"localhost:{agent.ports['grpc_tls']}",
        datacentre="dc1",
        ca=files.ca_path,
        certificate=files.cert_path,
        key=files.key_path,
    )


async def test_registration_and_certificates_go_over_tls(config: ConsulConfig, tmp_path: Path) -> None:
    async with ConsulClient(config) as client:
        registry = ConsulRegistry(client)
        await registry.register(instance(), lease_s=LEASE_S)
        assert await registry.instances() == [instance()]
        identity = await ConnectCertificateSource(tmp_path, "vectors", client).obtain()
        assert "/dc/dc1/svc/vectors" in identity.spiffe_id
        await registry.deregister("vectors-1")


async def test_an_agent_of_another_authority_is_not_believed(config: ConsulConfig, tmp_path: Path) -> None:
    other = LocalCertificateSource(tmp_path, "other", 3600).ensure()
    async with ConsulClient(config.model_copy(update={"ca": other.ca_path})) as client:
        with pytest.raises(UnavailableError):
            await client.check_access()


async def test_without_a_certificate_the_agent_refuses(config: ConsulConfig) -> None:
    async with ConsulClient(config.model_copy(update={"certificate": None, "key": None})) as client:
        with pytest.raises(UnavailableError):
            await client.check_access()


async def test_another_datacentre_is_asked_for_by_name(config: ConsulConfig) -> None:
    async with ConsulClient(config.model_copy(update={"datacentre": "dc9"})) as client:
        with pytest.raises(UnavailableError, match=r"dc9|No path to datacenter"):
            await ConsulRegistry(client).instances("vectors")


async def test_files_that_cannot_be_used_are_named(config: ConsulConfig, tmp_path: Path) -> None:
    broken = config.model_copy(update={"ca": tmp_path / "missing.pem"})
    with pytest.raises(InvalidArgumentError, match=r"consul\.ca"):
        async with ConsulClient(broken):
            pass
