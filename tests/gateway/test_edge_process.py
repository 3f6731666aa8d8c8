"""The edge process as `plexus up` runs it, without any service behind it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from services.gateway.config import GatewayConfig
from services.gateway.credentials import CredentialStore
from services.gateway.envoy.listener import listener
from services.gateway.kong import KongFileError
from services.runtime.config import project_file
from tests.gateway.process import edge_process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

WAIT_S = 20.0


@asynccontextmanager
async def _edge(state: Path, kong: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = GatewayConfig(kong_path=kong, reload_interval_s=0.05, drain_s=2, workers=1)
    async with (
        edge_process(state, config) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client,
    ):
        yield client


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110 - another process tells by its answers alone
            await asyncio.sleep(0.02)


@pytest.fixture
def kong(tmp_path: Path) -> Path:
    path = tmp_path / "kong.yml"
    path.write_text(project_file("gateway/kong.yml").read_text())
    return path


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    temporary = path.with_suffix(".new")
    temporary.write_text(text.replace(old, new))
    temporary.replace(path)


async def test_edge_stands_alone_and_names_what_is_away(tmp_path: Path, kong: Path) -> None:
    state = tmp_path / "state"
    async with _edge(state, kong) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/v1/buckets")).status_code == 401
        headers = {"authorization": f"Bearer {CredentialStore(state).mint_token('reader')}"}
        answer = await client.get("/v1/buckets", headers=headers)
        assert answer.status_code == 503
        assert answer.json()["code"] == 14
        secrets = list((state / "run" / "edge").rglob("*.json"))
        assert secrets
        assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)


async def test_changed_kong_yml_counts_without_a_refused_request(tmp_path: Path, kong: Path) -> None:
    async with _edge(tmp_path / "state", kong) as client:
        failures: list[int] = []
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                answer = await client.get("/healthz")
                if answer.status_code != 200:
                    failures.append(answer.status_code)

        asking = asyncio.create_task(ask())

        async def renamed() -> bool:
            return (await client.get("/v1/pails")).status_code == 401

        assert not await renamed()
        _replace(kong, "~/v1/buckets(/|:|$)", "~/v1/pails(/|:|$)")
        await _until(renamed)
        # A file at fault changes nothing.
        _replace(kong, "retries: 2", "retry_forever: true")
        await asyncio.sleep(0.3)
        assert await renamed()
        done.set()
        await asking
        assert failures == []


async def test_killed_envoy_comes_back(tmp_path: Path, kong: Path) -> None:
    async with _edge(tmp_path / "state", kong) as client:
        await client.get("/healthz")
        os.kill(_envoy_child(), signal.SIGKILL)

        async def answers() -> bool:
            try:
                return (await client.get("/healthz")).status_code == 200
            except httpx.TransportError:
                return False

        async def gone() -> bool:
            return not await answers()

        await _until(gone)
        await _until(answers)


def _envoy_child() -> int:
    listed = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    children = [int(pid) for pids in listed for pid in pids]
    found = [pid for pid in children if "envoy" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(found) == 1
    return found[0]


async def test_field_that_cannot_be_honoured_stops_the_start(tmp_path: Path, kong: Path) -> None:
    _replace(kong, "policy: local", "policy: redis")
    with pytest.raises(KongFileError, match=r"plugins\[2\].config.policy: 'redis' is not honoured"):
        async with _edge(tmp_path / "state", kong):
            pass


async def test_listener_without_tls_is_bound_to_loopback_alone() -> None:
    class _Open:
        host, certificate = "0.0.0.0", None

    with pytest.raises(ValueError, match="only a loopback address"):
        listener(_Open())  # type: ignore[arg-type]
