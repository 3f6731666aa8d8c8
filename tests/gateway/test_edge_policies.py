"""Traffic policies at the edge: a real Envoy, what the control plane says, two versions of a service."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio
import structlog

from plexus.vectors.v1 import vectors_pb2, vectors_pb2_grpc
from services.gateway import main
from services.gateway.config import GatewayConfig
from services.gateway.credentials import CredentialStore
from services.runtime.config import project_file
from tests.mesh.traffic import Server, Traffic
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]
DEADLINE_S = 90.0
LIST = "/v1/vectors/collections"
ONE, TWO = Counter(one=10), Counter(two=10)
KONG = project_file("gateway/kong.yml")
GET = "/v1/vectors/collections/any"


class Vectors(Server):
    """Answers with its name for that of a collection."""

    def handlers(self) -> grpc.GenericRpcHandler:
        collection = vectors_pb2.Collection(name=self.name)
        listed = vectors_pb2.ListCollectionsResponse(collections=[collection])

        async def answer_list(_request: Any, _context: Any) -> Any:
            return listed

        async def answer_get(_request: Any, _context: Any) -> Any:
            return collection

        handlers: dict[str, Any] = {
            "ListCollections": grpc.unary_unary_rpc_method_handler(
                answer_list,
                vectors_pb2.ListCollectionsRequest.FromString,
                vectors_pb2.ListCollectionsResponse.SerializeToString,
            ),
            "GetCollection": grpc.unary_unary_rpc_method_handler(
                answer_get,
                vectors_pb2.GetCollectionRequest.FromString,
                vectors_pb2.Collection.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler("plexus.vectors.v1.VectorsService", handlers)


class Edge:
    """What answers through it."""

    def __init__(self, traffic: Traffic, client: httpx.AsyncClient, native: Any, token: str) -> None:
        self.traffic = traffic
        self._client = client
        self._native = native
        self._token = token
        self._numbers = itertools.count()

    async def rest(self, path: str = LIST, count: int = 1, **headers: str) -> Counter[str]:
        """Who answered, or the status."""
        seen: Counter[str] = Counter()
        for _ in range(count):
            answer = await self._client.get(path, headers={"authorization": self._token, **headers})
            body = answer.json()
            if answer.status_code != httpx.codes.OK:
                seen[f"{answer.status_code}"] += 1
            else:
                seen[body["collections"][0]["name"] if "collections" in body else body["name"]] += 1
        return seen

    async def grpc(self, count: int = 1, **headers: str) -> Counter[str]:
        """The same of native gRPC."""
        stub: Any = vectors_pb2_grpc.VectorsServiceStub(self._native)
        metadata = [("authorization", self._token), *headers.items()]
        seen: Counter[str] = Counter()
        for _ in range(count):
            request = vectors_pb2.ListCollectionsRequest()
            answer = await stub.ListCollections(request, metadata=metadata, timeout=DEADLINE_S)
            seen[answer.collections[0].name] += 1
        return seen

    async def until(self, done: Callable[[Counter[str]], bool], count: int = 12) -> None:
        """Ask until a row of answers is as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while not done(seen := await self.rest(count=count)):
            assert time.monotonic() < deadline, seen

    def policy(self, old: int, new: int, *routes: str) -> None:
        """Shares of the two versions, and routes beside."""
        subsets = f"{{old: {{version: '1.*', weight: {old}}}, new: {{version: '2.*', weight: {new}}}}}"
        self.traffic.policy(f"subsets: {subsets}\nroutes: [{', '.join(routes)}]")

    async def applied(self, old: int, new: int, *routes: str) -> None:
        """Have a policy and wait until it is in force.

        By two headers of its own: the answers to other requests may be what the policy before gives.
        """
        number = next(self._numbers)
        probes = {f"{subset}-{number}": subset for subset in ("old", "new")}
        known = [route(f"headers: [{{name: x-probe, exact: {p}}}]", s) for p, s in probes.items()]
        self.policy(old, new, *known, *routes)
        deadline = time.monotonic() + DEADLINE_S
        while (seen := [await self.rest(count=10, **{"x-probe": probe}) for probe in probes]) != [ONE, TWO]:
            assert time.monotonic() < deadline, seen


def route(match: str, subset: str) -> str:
    """One route of a policy."""
    return f"{{match: {{{match}}}, subsets: {{{subset}: 1}}}}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    async with AsyncExitStack() as stack:
        traffic = await stack.enter_async_context(Traffic(tmp_path_factory.mktemp("traffic")))
        for name, version in (("one", "1.0"), ("two", "2.0")):
            server = traffic.servers[name] = Vectors(name, version=version)
            await server.start(traffic.state)
        traffic.publish()
        ready, stop, port = asyncio.Event(), asyncio.Event(), free_port()
        # Hundreds of requests a second are no test of the limits.
        kong = traffic.folder / "kong.yml"
        kong.write_text(re.sub(r"(minute|second): \d+", r"\1: 1000000", KONG.read_text()))
        config = GatewayConfig(kong_path=kong, drain_s=0, workers=1)
        running = asyncio.create_task(
            main.serve(traffic.state, port, traffic.port, ready.set, stop, config=config)
        )
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({running, waiting}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        token = f"Bearer {CredentialStore(traffic.state).mint_token('demo', 3600)}"
        base_url = f"http://127.0.0.1:{port}"
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, timeout=DEADLINE_S))
        native = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        try:
            yield Edge(traffic, client, native, token)
        finally:
            stop.set()
            await asyncio.gather(running, return_exceptions=True)
            structlog.reset_defaults()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def both(edge: Edge) -> None:
    """Each test begins with both versions known."""
    edge.traffic.publish()


async def test_shares_of_versions_are_kept_and_changed_live(edge: Edge) -> None:
    await edge.applied(100, 0)
    assert await edge.rest(count=10) == ONE
    await edge.applied(90, 10)
    seen = await edge.rest(count=400)
    assert seen["one"] + seen["two"] == 400, seen
    assert 0 < seen["two"] < 120, seen  # 40 expected
    await edge.applied(0, 100)
    assert await edge.rest(count=10) == TWO
    assert await edge.grpc(10) == TWO


async def test_a_header_chooses_a_version_over_rest_and_grpc(edge: Edge) -> None:
    await edge.applied(100, 0, route("headers: [{name: x-beta, exact: 'yes'}]", "new"))
    assert await edge.rest(count=10, **{"x-beta": "yes"}) == TWO
    assert await edge.rest(GET, count=10, **{"x-beta": "yes"}) == TWO
    assert await edge.grpc(10, **{"x-beta": "yes"}) == TWO
    assert await edge.rest(count=10, **{"x-beta": "no"}) == ONE
    assert await edge.grpc(10) == ONE


async def test_a_method_chooses_a_version_over_rest_and_grpc(edge: Edge) -> None:
    await edge.applied(100, 0, route("method: /plexus.vectors.v1.VectorsService/ListCollections", "new"))
    assert await edge.rest(f"{LIST}?page_size=3", count=10) == TWO
    assert await edge.rest(GET, count=10) == ONE
    assert await edge.grpc(10) == TWO


async def test_when_a_version_is_gone_the_other_answers_and_no_request_fails(edge: Edge) -> None:
    await edge.applied(50, 50)
    edge.traffic.publish("one")
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + DEADLINE_S
    while (row := await edge.rest(count=30)).keys() != {"one"}:
        seen += row
        assert time.monotonic() < deadline, row
    assert seen.keys() <= {"one", "two"}


async def test_without_a_control_plane_the_shares_hold_and_later_changes_come(edge: Edge) -> None:
    await edge.applied(0, 100)
    await edge.traffic.stop_control()
    try:
        assert await edge.rest(count=30) == Counter(two=30)
        edge.policy(100, 0)
    finally:
        await edge.traffic.start_control()
    await edge.until(lambda seen: seen.keys() == {"one"})
