"""Watches of a server that lies about indexes, fails, hangs, drips or sends garbage."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from services.mesh.consul import client as client_module
from services.mesh.consul import watch
from services.mesh.consul.answers import index_of
from services.mesh.consul.catalogue import watch_service
from services.mesh.consul.client import ConsulClient
from services.mesh.consul.intentions import watch_intentions
from services.mesh.consul.kv import KeyValues
from services.mesh.trust.consul import watch_roots
from services.mesh.trust.local import LocalCertificateSource
from services.runtime.errors import (
    DataLossError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.mesh.consul.stub import Stub, answer, blocking

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from services.mesh.consul.answers import Answer

PATH = "/v1/kv/x"


@asynccontextmanager
async def watching(stub: Stub) -> AsyncIterator[AsyncGenerator[Answer, None]]:
    async with stub, ConsulClient(stub.config) as client:
        watched: Any = watch.changes(client, PATH)
        async with contextlib.aclosing(watched):
            yield watched


async def following(watched: Any) -> list[bytes]:
    """Watch for ever in the background of a test; the bodies told so far."""
    return [seen.body async for seen in watched]


async def ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("index", ["0", "-1", "1e9", "", "many", "9" * 40, str(2**64), None])
async def test_an_index_that_is_none_neither_blocks_nor_spins(index: str | None) -> None:
    async def serve(_request: web.Request) -> web.Response:
        return answer([1], index)

    stub = Stub(serve)
    async with watching(stub) as watched:
        assert (await anext(watched)).body == b"[1]"
        task = asyncio.create_task(following(watched))
        queries = await stub.requests(watch.BURST + 6)
        await ended(task)
    assert all("index" not in query for query in queries)
    times = [at for at, _ in stub.asked]
    # The pace allows the burst at once and the rest at its rate, however quick the server is.
    assert times[-1] - times[0] >= (len(times) - 1 - watch.BURST) / watch.RATE_PER_S - 0.05


async def test_waits_are_spread_and_never_longer_than_configured() -> None:
    numbers = itertools.count(1)

    async def serve(_request: web.Request) -> web.Response:
        return answer("same", str(next(numbers)))

    stub = Stub(serve)
    async with watching(stub) as watched:
        await anext(watched)
        task = asyncio.create_task(following(watched))
        queries = await stub.requests(watch.BURST)
        await ended(task)
    waits_ms = [int(query["wait"].removesuffix("ms")) for query in queries[1:]]
    longest_ms = stub.config.wait_s * 1000
    assert all(0.8 * longest_ms - 1 <= wait <= longest_ms for wait in waits_ms)
    assert len(set(waits_ms)) > 1  # a thousand watches that began together do not ask together for ever


async def test_an_index_that_falls_starts_the_watch_anew() -> None:
    bodies = iter([("a", "100"), ("b", "7"), ("b", "7"), ("c", "8")])

    async def serve(_request: web.Request) -> web.Response:
        following_up = next(bodies, None)
        if following_up is None:
            await asyncio.sleep(3600)
        return answer(*(following_up or ("", "")))

    stub = Stub(serve)
    async with watching(stub) as watched:
        assert [(await anext(watched)).body for _ in range(3)] == [b"a", b"b", b"c"]
        task = asyncio.create_task(following(watched))
        queries = await stub.requests(5)
        await ended(task)
    assert [query.get("index") for query in queries] == [None, "100", None, "7", "8"]
    # From the beginning and anew: never from a server that has not replayed its log.
    assert ["consistent" in query for query in queries] == [True, False, True, False, False]


async def test_a_body_is_told_once_however_often_the_index_moves() -> None:
    numbers = itertools.count(1)

    async def serve(_request: web.Request) -> web.Response:
        number = next(numbers)
        return answer("same" if number < 6 else "other", str(number))

    async with watching(Stub(serve)) as watched:
        assert [(await anext(watched)).body for _ in range(2)] == [b"same", b"other"]


async def test_another_body_at_the_same_index_is_told() -> None:
    bodies = itertools.chain(["old"], itertools.repeat("new"))

    async def serve(_request: web.Request) -> web.Response:
        return answer(next(bodies), "14")

    async with watching(Stub(serve)) as watched:
        assert [(await anext(watched)).body for _ in range(2)] == [b"old", b"new"]


@pytest.mark.parametrize("status", [400, 403, 429, 500, 503])
async def test_an_error_is_not_told_its_index_is_not_kept_and_pauses_grow(status: int) -> None:
    good = True

    async def serve(_request: web.Request) -> web.Response:
        return answer("good", "50") if good else answer("bad", "1", status=status)

    stub = Stub(serve)
    async with watching(stub) as watched:
        assert (await anext(watched)).body == b"good"
        good = False
        task = asyncio.ensure_future(anext(watched))
        queries = await stub.requests(5)
        assert not task.done()
        assert queries[1]["index"] == "50"
        assert all("index" not in query for query in queries[2:])
        times = [at for at, _ in stub.asked]
        assert times[4] - times[3] > watch.BACKOFF_MIN_S  # half of 0.4 s and more: they double
        stub.answering = _constant("better")
        assert (await asyncio.wait_for(task, 60)).body == b"better"


def _constant(body: str) -> Any:
    async def serve(_request: web.Request) -> web.Response:
        return answer(body, "51")

    return serve


async def test_a_server_that_hangs_is_given_up_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MARGIN_S", 0.3)

    async def serve(request: web.Request) -> web.Response:
        if blocking(request):
            await asyncio.sleep(3600)
        return answer("same", "5")

    stub = Stub(serve)
    async with watching(stub) as watched:
        await anext(watched)
        task = asyncio.create_task(following(watched))
        queries = await stub.requests(6)
        await ended(task)
    assert [query.get("index") for query in queries] == [None, "5", None, "5", None, "5"]


async def test_a_slow_drip_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MARGIN_S", 0.3)

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Consul-Index": "6"})
        await response.prepare(request)
        while True:  # until the other side is gone
            await response.write(b"[")
            await asyncio.sleep(0.02)

    async def serve(request: web.Request) -> web.StreamResponse:
        return await drip(request) if blocking(request) else answer("same", "5")

    stub = Stub(serve)
    async with watching(stub) as watched:
        await anext(watched)
        task = asyncio.create_task(following(watched))
        await stub.requests(5)
        assert not task.done()
        await ended(task)


async def test_an_endless_body_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_BODY_BYTES", 100_000)

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)

    async with Stub(serve) as stub, ConsulClient(stub.config) as client:
        with pytest.raises(DataLossError):
            await client.request("GET", PATH)


@pytest.mark.parametrize(
    "garbage",
    ["", "<html>", "{", "7", '"x"', "[7]", "[{}]", '[{"Service": {}, "Node": {}, "Checks": []}]', "{}"],
)
async def test_garbage_leaves_the_last_good_instances(garbage: str) -> None:
    good: list[Any] = [
        {
            "Node": {"Node": "n", "Address": "127.0.0.1"},
            "Service": {"ID": "a-1", "Service": "a", "Address": "", "Port": 9, "Tags": None, "Meta": None},
            "Checks": [],
        }
    ]
    state: list[Any] = [good, "20"]

    async def serve(_request: web.Request) -> web.Response:
        return answer(*state)

    stub = Stub(serve)
    async with stub, ConsulClient(stub.config) as client:
        watched = watch_service(client, "a")
        assert [entry.id for entry in await anext(watched)] == ["a-1"]
        state[:] = [garbage, "21"]
        task = asyncio.ensure_future(anext(watched))
        await stub.requests(len(stub.asked) + 3)
        assert not task.done()
        state[:] = [[good[0], {**good[0], "Service": {**good[0]["Service"], "ID": "a-2", "Port": 10}}], "22"]
        assert [entry.id for entry in await asyncio.wait_for(task, 60)] == ["a-1", "a-2"]


@pytest.mark.parametrize(
    "garbage", ['[{"Key": "k"}]', '[{"Key": "k", "Value": "%%%", "ModifyIndex": 1}]', "{}"]
)
async def test_garbage_leaves_the_last_good_keys(garbage: str) -> None:
    texts = iter(["[]", garbage, garbage])

    async def serve(_request: web.Request) -> web.Response:
        text = next(texts, '[{"Key": "k", "Value": "YQ==", "ModifyIndex": 1}]')
        return answer(text, "2")

    async with Stub(serve) as stub, ConsulClient(stub.config) as client:
        watched = KeyValues(client).watch("x")
        async with asyncio.timeout(60):
            assert await anext(watched) == {}
            assert await anext(watched) == {"k": b"a"}


def rule(action: str) -> str:
    return f'{{"a": [{{"SourceName": "b", "DestinationName": "a", "Action": "{action}"}}]}}'


@pytest.mark.parametrize(
    "garbage",
    ["", "<html>", "7", '{"a": 7}', '{"a": [7]}', '{"a": [{}]}', rule("perhaps"), rule("allow")[:-3]],
)
async def test_garbage_leaves_the_last_good_intentions(garbage: str) -> None:
    texts = iter([rule("deny"), garbage, garbage])

    async def serve(_request: web.Request) -> web.Response:
        return answer(next(texts, rule("allow")), "2")

    async with Stub(serve) as stub, ConsulClient(stub.config) as client, asyncio.timeout(60):
        watched = watch_intentions(client, "a")
        told = [(await anext(watched)).decide("b", "a", "/x.Y/Z").allowed for _ in range(2)]
    assert told == [False, True]


def roots(pem: str) -> str:
    root = {"ID": "r", "RootCert": pem}
    return json.dumps({"TrustDomain": "x.consul", "ActiveRootID": "r", "Roots": [root]})


@pytest.mark.parametrize("garbage", ["", "<html>", "7", "{}", "[]", '{"Roots": [{}]}', roots("no root")])
async def test_garbage_leaves_the_last_good_roots(garbage: str, tmp_path: Path) -> None:
    pems = [LocalCertificateSource(tmp_path / name, "a", 60).ensure().ca_path.read_text() for name in "ab"]
    texts = iter([roots(pems[0]), garbage, garbage])

    async def serve(_request: web.Request) -> web.Response:
        return answer(next(texts, roots(pems[1])), "2")

    async with Stub(serve) as stub, ConsulClient(stub.config) as client, asyncio.timeout(60):
        watched = watch_roots(client)
        assert [(await anext(watched)).pem.decode() for _ in range(2)] == pems


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (403, PermissionDeniedError),
        (429, ResourceExhaustedError),
        (500, UnavailableError),
        (503, UnavailableError),
        (302, UnavailableError),
    ],
)
async def test_a_status_becomes_the_error_that_it_means(status: int, error: type[Exception]) -> None:
    async def serve(_request: web.Request) -> web.Response:
        return answer("ACL not found", "1", status=status)

    async with Stub(serve) as stub, ConsulClient(stub.config) as client:
        with pytest.raises(error):
            await client.request("GET", PATH)


async def test_nobody_there_is_unavailable_with_the_dependency_named() -> None:
    async with Stub(_constant("x")) as stub:
        config = stub.config
    async with ConsulClient(config) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.request("GET", PATH)
    assert caught.value.metadata == {"dependency": "consul"}


@pytest.mark.parametrize(
    ("text", "index"), [("14", 14), (str(2**63 - 1), 2**63 - 1), (str(2**63), 0), ("٣", 0)]
)
def test_only_digits_that_fit_are_an_index(text: str, index: int) -> None:
    assert index_of(text) == index
