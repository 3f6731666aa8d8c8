"""The public certificate: clients speak TLS to the edge itself."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme
from pydantic import ValidationError

from services.gateway.config import GatewayConfig
from services.gateway.proxy import EdgeConfigError, write_private
from services.runtime.config import project_file
from tests.gateway.process import START_S, edge_process

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path


class Public:
    """The certificate's files, and an authority that clients believe."""

    def __init__(self, folder: Path) -> None:
        self.chain, self.key = folder / "edge.pem", folder / "edge-key.pem"
        self._authority = trustme.CA()
        self.renew()

    def renew(self, *, matching: bool = True) -> str:
        """Write another certificate, with a key that belongs to it or to none; its text."""
        made, other = (self._authority.issue_cert("localhost", "127.0.0.1") for _ in range(2))
        chain = made.cert_chain_pems[0].bytes().decode()
        write_private(self.key, (made if matching else other).private_key_pem.bytes().decode())
        write_private(self.chain, chain)
        return chain

    def trusting(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    async def shown(self, port: int) -> str:
        """The certificate that a client gets now."""
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self.trusting("h2"))
        try:
            tls = writer.get_extra_info("ssl_object")
            assert tls.selected_alpn_protocol() == "h2"
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True))
        finally:
            writer.close()


@pytest.fixture
def public(tmp_path: Path) -> Public:
    return Public(tmp_path)


def _edge(state: Path, public: Public) -> AbstractAsyncContextManager[int]:
    config = GatewayConfig(
        host="0.0.0.0",
        kong_path=project_file("gateway/kong.yml"),
        tls_certificate=public.chain,
        tls_key=public.key,
        reload_interval_s=0.05,
        drain_s=1,
        workers=1,
    )
    return edge_process(state, config)


def _same(one: str, other: str) -> bool:
    return ssl.PEM_cert_to_DER_cert(one) == ssl.PEM_cert_to_DER_cert(other)


async def test_clients_speak_tls_and_a_replaced_certificate_breaks_no_connection(
    tmp_path: Path, public: Public
) -> None:
    async with (
        _edge(tmp_path / "state", public) as port,
        httpx.AsyncClient(
            base_url=f"https://localhost:{port}", verify=public.trusting(), timeout=20
        ) as client,
    ):
        assert (await client.get("/healthz")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await httpx.AsyncClient().get(f"http://127.0.0.1:{port}/healthz")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await httpx.AsyncClient().get(f"https://localhost:{port}/healthz")

        new = public.renew()
        async with asyncio.timeout(START_S):
            while not _same(await public.shown(port), new):  # noqa: ASYNC110 - another process tells by its answers alone
                await asyncio.sleep(0.05)
        public.renew(matching=False)
        for _ in range(20):  # a key of another certificate is refused: nothing changes
            assert _same(await public.shown(port), new)
            await asyncio.sleep(0.05)
        assert (await client.get("/healthz")).status_code == 200


async def test_private_key_is_in_private_files_alone(tmp_path: Path, public: Public) -> None:
    secret = public.key.read_text().splitlines()[1]
    async with _edge(tmp_path / "state", public):
        holding = [path for path in (tmp_path / "state").rglob("*.json") if secret in path.read_text()]
        assert holding
        assert all(path.stat().st_mode & 0o077 == 0 for path in holding)


async def test_missing_certificate_stops_the_start_and_is_named(tmp_path: Path, public: Public) -> None:
    public.chain.unlink()
    with pytest.raises(EdgeConfigError, match=r"gateway.tls_certificate: .*edge.pem: No such file"):
        async with _edge(tmp_path / "state", public):
            pass


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"host": "0.0.0.0"}, "needs tls_certificate and tls_key"),
        ({"host": "edge.example"}, "does not appear to be an IPv4 or IPv6 address"),
        ({"tls_certificate": "edge.pem"}, "belong together"),
        ({"tls_key": "edge-key.pem"}, "belong together"),
    ],
)
def test_settings_that_would_serve_strangers_in_the_clear_are_refused(
    settings: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        GatewayConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"), ("127.0.0.2", "http://127.0.0.2:80")],
)
def test_this_machine_reaches_the_edge_where_it_listens(host: str, url: str) -> None:
    assert GatewayConfig(host=host).url(80) == url


def test_an_edge_on_every_address_is_reached_over_tls_on_the_loopback_one(public: Public) -> None:
    config = GatewayConfig(host="0.0.0.0", tls_certificate=public.chain, tls_key=public.key)
    assert config.url(443) == "https://127.0.0.1:443"
