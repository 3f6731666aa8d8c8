"""Identities from a real Connect CA."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from services.mesh.trust import consul as connect
from services.mesh.trust.consul import ConnectCertificateSource, read_roots, sign
from services.mesh.trust.files import locked
from services.mesh.trust.names import LOOPBACK, alternative_names
from services.runtime.credentials import server_credentials
from services.runtime.errors import InvalidArgumentError, UnavailableError
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from services.mesh.trust.domain import Identity

WITHIN_S = 90.0


@pytest.fixture(scope="module")
def authority(consul_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    """A server whose CA these tests may change."""
    with ConsulAgent(consul_program, tmp_path_factory.mktemp("authority")) as started:
        yield started


def config_of(agent: ConsulAgent) -> ConsulConfig:
    return ConsulConfig(address=agent.url, grpc_address=agent.grpc, wait_s=5)


@pytest.fixture
async def client(authority: ConsulAgent) -> AsyncIterator[ConsulClient]:
    async with ConsulClient(config_of(authority)) as opened:
        yield opened


def configure(agent: ConsulAgent, **changes: Any) -> None:
    """Change the CA's configuration; a new private key makes a new root."""
    with agent.http() as http:
        present = http.get("/connect/ca/configuration").json()
        body = {"Provider": "consul", "Config": {**present["Config"], **changes}}
        answer = http.put("/connect/ca/configuration", json=body)
        assert answer.status_code == 200, answer.text


def new_root(agent: ConsulAgent) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    configure(agent, PrivateKey=key.decode(), RootCert="")


def leaf_of(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificates(identity.cert_path.read_bytes())[0]


@contextlib.asynccontextmanager
async def rotating(source: ConnectCertificateSource) -> AsyncIterator[asyncio.Queue[Identity]]:
    changed: asyncio.Queue[Identity] = asyncio.Queue()
    task = asyncio.create_task(source.rotate(changed.put_nowait))
    try:
        yield changed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():  # noqa: ASYNC110 - files tell nobody
            await asyncio.sleep(0.05)


async def test_an_identity_has_the_spiffe_id_that_consul_issues_and_names_hosts(
    client: ConsulClient, tmp_path: Path
) -> None:
    identity = await ConnectCertificateSource(tmp_path, "vectors", client).obtain()
    roots = await read_roots(client)
    names = leaf_of(identity).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    expected = f"spiffe://{roots.trust_domain}/ns/default/dc/dc1/svc/vectors"
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [expected]
    assert identity.spiffe_id == expected
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    leaf_of(identity).verify_directly_issued_by(x509.load_pem_x509_certificates(roots.pem)[0])
    assert identity.ca_path.read_bytes() == roots.pem


async def test_the_key_is_made_here_in_pkcs8_for_its_owner_alone(
    client: ConsulClient, tmp_path: Path
) -> None:
    identity = await ConnectCertificateSource(tmp_path, "vectors", client).obtain()
    assert stat.S_IMODE(identity.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(identity.key_path.parent.stat().st_mode) == 0o700
    assert identity.key_path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert (
        leaf_of(identity).public_key()
        == serialization.load_pem_private_key(identity.key_path.read_bytes(), None).public_key()
    )


async def test_a_young_identity_is_kept_and_used_while_consul_is_away(
    client: ConsulClient, tmp_path: Path
) -> None:
    source = ConnectCertificateSource(tmp_path, "vectors", client)
    content = (await source.obtain()).cert_path.read_bytes()
    assert (await source.obtain()).cert_path.read_bytes() == content
    away = ConsulConfig(address="http://127.0.0.1:1", grpc_address="127.0.0.1:1", request_timeout_s=1)
    async with ConsulClient(away) as nobody:
        kept = await ConnectCertificateSource(tmp_path, "vectors", nobody).obtain()
    assert kept.cert_path.read_bytes() == content


def test_a_program_without_an_event_loop_gets_one_too(authority: ConsulAgent, tmp_path: Path) -> None:
    closed = ConsulClient(config_of(authority))
    identity = ConnectCertificateSource(tmp_path, "vectors", closed).ensure()
    assert identity.spiffe_id.endswith("/svc/vectors")


async def test_a_first_identity_waits_for_consul(client: ConsulClient, tmp_path: Path) -> None:
    away = client.config.model_copy(update={"grpc_address": "127.0.0.1:1", "request_timeout_s": 1.0})
    async with ConsulClient(away) as nobody:
        source = ConnectCertificateSource(tmp_path, "vectors", nobody)
        with pytest.raises(UnavailableError):
            await sign(away, b"")
        waiting = asyncio.create_task(source.obtain())
        await asyncio.wait([waiting], timeout=0.5)
        assert not waiting.done()
        nobody.config = client.config  # Consul is back
        assert (await asyncio.wait_for(waiting, WITHIN_S)).not_after > datetime.now(UTC)


async def test_another_service_domain_is_not_signed(client: ConsulClient) -> None:
    names = alternative_names("spiffe://elsewhere.consul/ns/default/dc/dc1/svc/x", "x", LOOPBACK)
    csr = connect._csr(names, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(InvalidArgumentError):
        await sign(client.config, csr)


async def test_a_leaf_of_seconds_is_renewed_before_it_ends(
    authority: ConsulAgent, client: ConsulClient, tmp_path: Path
) -> None:
    # Consul counts from a minute ago: fifteen seconds are left.
    configure(authority, LeafCertTTL="75s", SkipValidate=True)
    try:
        source = ConnectCertificateSource(tmp_path, "vectors", client)
        first = await source.obtain()
        async with rotating(source) as changed, asyncio.timeout(WITHIN_S):
            before, renewed = first, await changed.get()
            assert renewed.not_after > before.not_after
            assert datetime.now(UTC) < before.not_after  # there was time left
            again = await changed.get()
            assert again.not_after > renewed.not_after
    finally:
        configure(authority, LeafCertTTL="72h", SkipValidate=False)


async def test_while_the_root_changes_both_are_trusted_and_no_call_fails(
    authority: ConsulAgent, client: ConsulClient, tmp_path: Path
) -> None:
    server_source = ConnectCertificateSource(tmp_path, "vectors", client)
    client_source = ConnectCertificateSource(tmp_path, "knowledge", client)
    served, calling = await server_source.obtain(), await client_source.obtain()
    old = (await read_roots(client)).pem
    server = grpc.aio.server()

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Say": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(served))
    await server.start()

    async def call() -> None:
        """On a connection of its own, with whatever is on disk at the moment."""
        with locked(calling.key_path.parent):  # else of two identities, the key of one
            files = [path.read_bytes() for path in (calling.ca_path, calling.key_path, calling.cert_path)]
        credentials = grpc.ssl_channel_credentials(*files)
        # The name of the host is verified: the leaf has one.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
            ask: Any = channel.unary_unary("/test.Echo/Say")
            assert await ask(b"x", timeout=30) == b"x"

    leaves = [leaf_of(identity).serial_number for identity in (served, calling)]
    both = [served.ca_path, calling.ca_path]
    try:
        async with rotating(server_source), rotating(client_source):
            await call()
            new_root(authority)
            new = (await read_roots(client)).pem
            assert new.count(b"BEGIN CERTIFICATE") == 2
            assert old in new

            def done() -> bool:
                serials = [leaf_of(identity).serial_number for identity in (served, calling)]
                return all(path.read_bytes() == new for path in both) and all(
                    now != then for now, then in zip(serials, leaves, strict=True)
                )

            async with asyncio.timeout(WITHIN_S):
                while not done():
                    await call()
            await call()
    finally:
        await server.stop(0)


async def test_after_consul_lost_its_data_the_identity_is_of_the_new_authority(
    consul_program: Path, tmp_path: Path
) -> None:
    with ConsulAgent(consul_program, tmp_path / "consul") as agent:
        async with ConsulClient(config_of(agent)) as client:
            source = ConnectCertificateSource(tmp_path, "vectors", client)
            first = await source.obtain()
            before = await read_roots(client)
            async with rotating(source):
                agent.kill()
                agent.wipe()
                await asyncio.to_thread(agent.start)
                after = await read_roots(client)
                assert after.trust_domain != before.trust_domain
                await until(lambda: first.ca_path.read_bytes() == after.pem)
                await until(
                    lambda: (
                        after.trust_domain
                        in str(
                            leaf_of(first)
                            .extensions.get_extension_for_class(x509.SubjectAlternativeName)
                            .value
                        )
                    )
                )
