"""What a real gRPC client (C-core) does against expectation; the control plane's rules are made of this.

Each test publishes a resource that the control plane would not, and so also tells when a library changes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.clusters import _TLS
from services.mesh.xds.resources import CLUSTER, ENDPOINT, LISTENER, ROUTE, Body, Resource, pack
from tests.mesh.traffic import Server, Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.mesh.traffic import Client

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def traffic(tmp_path: Path) -> AsyncIterator[Traffic]:
    async with Traffic(tmp_path) as traffic:
        yield traffic


def change(traffic: Traffic, url: str, message: Any, edit: Callable[[Any], None]) -> None:
    """Publish a resource of `vectors`, edited."""
    name = "vectors-route" if url == ROUTE else "vectors"
    published = traffic.hub.get(url, name)
    assert published is not None
    message.ParseFromString(published.body.any.value)
    edit(message)
    traffic.hub.publish({(url, name): Resource(Body.of(url, message))})


async def serving(traffic: Traffic, *names: str) -> tuple[Client, list[Server]]:
    servers = await traffic.start(*names)
    client = await traffic.client()
    await client.until(lambda answers: set(answers.seen) == set(names))
    return client, servers


def _sans(typed_only: bool) -> Callable[[Any], None]:
    def edit(cluster: xds_pb2.Cluster) -> None:
        tls = xds_pb2.UpstreamTlsContext.FromString(cluster.transport_socket.typed_config.value)
        if typed_only:
            del tls.common_tls_context.validation_context.match_subject_alt_names[:]
        cluster.transport_socket.typed_config.CopyFrom(pack(_TLS, tls))

    return edit


async def test_the_typed_form_of_the_identity_alone_lets_an_impostor_in(traffic: Traffic) -> None:
    impostor = await traffic.server("impostor", "storage")
    impostor.service = "vectors"  # registered as what it is not; its certificate says `storage`
    traffic.publish()
    client = await traffic.client()
    refused = await client.calls(5)
    assert refused.failed() == 5
    assert any("SANs" in text for text in refused.seen), refused.seen
    change(traffic, CLUSTER, xds_pb2.Cluster(), _sans(typed_only=True))
    await client.until(lambda answers: answers.share("impostor") == 1)
    change(traffic, CLUSTER, xds_pb2.Cluster(), _sans(typed_only=False))
    assert traffic.refusals() == []


async def test_a_refused_resource_leaves_the_one_before_in_force_and_its_text_is_kept(
    traffic: Traffic,
) -> None:
    client, _ = await serving(traffic, "a")

    def random_policy(cluster: Any) -> None:
        cluster.lb_policy = 3

    change(traffic, CLUSTER, xds_pb2.Cluster(), random_policy)
    async with asyncio.timeout(60):
        while not traffic.refusals():  # noqa: ASYNC110 - the client tells nobody
            await asyncio.sleep(0.01)
    assert "LB policy is not supported" in traffic.refusals()[0]
    assert (await client.calls(20)).seen == {"a": 20}


async def test_a_deletion_is_ignored_by_clients_with_our_bootstrap(traffic: Traffic) -> None:
    client, _ = await serving(traffic, "a")
    calls = asyncio.create_task(client.calls(2000, at_once=2))
    for url in (LISTENER, CLUSTER):
        traffic.hub._drop((url, "vectors"))
        for connected in traffic.hub.clients:
            connected.changed(url, "vectors")
    assert (await calls).failed() == 0


async def test_an_assignment_emptied_live_and_a_tombstone_fail_calls_at_once(traffic: Traffic) -> None:
    client, _ = await serving(traffic, "a")

    def emptied(assignment: Any) -> None:
        del assignment.endpoints[:]

    change(traffic, ENDPOINT, xds_pb2.ClusterLoadAssignment(), emptied)
    await client.until(lambda answers: answers.failed() == answers.total, count=5)
    traffic.publish("a")
    await client.until(lambda answers: answers.share("a") == 1)
    traffic.plane.set_instances({"vectors": []})
    answers = await client.until(lambda answers: answers.failed() == answers.total, count=5)
    assert all(text.startswith("UNAVAILABLE") for text in answers.seen)


async def test_the_deadline_of_a_route_is_counted_from_another_clock(traffic: Traffic) -> None:
    client, (server,) = await serving(traffic, "a")

    def one_second(routes: Any) -> None:
        action = routes.virtual_hosts[0].routes[0].route
        action.max_stream_duration.max_stream_duration.FromSeconds(1)

    change(traffic, ROUTE, xds_pb2.RouteConfiguration(), one_second)
    # At once, although the server answers in no time: services/mesh/xds/routes.py allows for it.
    await client.until(lambda answers: answers.failed() == answers.total, count=3)
    calls = server.calls
    assert (await client.calls(3)).failed() == 3
    assert server.calls == calls


async def test_injected_aborts_are_not_tried_again(traffic: Traffic) -> None:
    client, (server,) = await serving(traffic, "a")
    traffic.policy("retry: {attempts: 5}\nfault: {abort: {code: unavailable, percent: 50}}")
    await client.until(lambda answers: answers.failed() > 0)
    server.attempts.clear()
    answers = await client.calls(400, at_once=4)
    assert answers.failed() / 400 == pytest.approx(0.5, abs=0.15)
    assert set(server.attempts) == {"0"}
