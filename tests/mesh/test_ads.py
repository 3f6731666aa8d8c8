"""The discovery protocol: one stream's state, and a bare client over a real server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.rpc import status_pb2

from plexus.xds.v1 import xds_pb2
from services.mesh import ads, main
from services.mesh.registry.local import LocalRegistry
from services.mesh.snapshot import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE, TOMBSTONE, Snapshot, build
from tests.contracts.registry import LEASE_S, instance

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Serve

SERVICES = ("vectors", "storage")
EMPTY = build([], SERVICES)
ONE = build([instance()], SERVICES)


def request(
    type_url: str, *names: str, nonce: str = "", error: str = "", version: str = ""
) -> xds_pb2.DiscoveryRequest:
    return xds_pb2.DiscoveryRequest(
        node=xds_pb2.Node(id="test"),
        version_info=version,
        type_url=type_url,
        resource_names=names,
        response_nonce=nonce,
        error_detail=status_pb2.Status(code=3, message=error) if error else None,
    )


class Stream:
    """One client's state over snapshots that the test publishes."""

    def __init__(self, snapshot: Snapshot = EMPTY) -> None:
        self._snapshots = ads.Snapshots()
        self._snapshots.publish(snapshot)
        self._state = ads._Stream(self._snapshots)

    def ask(self, *requests: xds_pb2.DiscoveryRequest) -> list[xds_pb2.DiscoveryResponse]:
        for entry in requests:
            self._state.take(entry)
        return self._state.responses()

    def publish(self, snapshot: Snapshot) -> list[xds_pb2.DiscoveryResponse]:
        self._snapshots.publish(snapshot)
        return self._state.responses()


def sizes(responses: list[xds_pb2.DiscoveryResponse]) -> list[tuple[str, int]]:
    return [(entry.type_url, len(entry.resources)) for entry in responses]


def test_clusters_go_first_and_routes_last_in_whatever_order_they_were_asked_for() -> None:
    asked = [
        request(url, "vectors-route" if url == ROUTE else "vectors")
        for url in (ROUTE, LISTENER, ENDPOINT, CLUSTER)
    ]
    assert [entry.type_url for entry in Stream().ask(*asked)] == list(PUSH_ORDER)


def test_only_what_changed_is_sent_and_nothing_twice() -> None:
    stream = Stream()
    first = stream.ask(request(CLUSTER, *SERVICES), request(ENDPOINT, *SERVICES))
    assert sizes(first) == [(CLUSTER, 2), (ENDPOINT, 2)]
    assert stream.publish(EMPTY) == []
    assert sizes(stream.publish(ONE)) == [(ENDPOINT, 1)]


def test_an_acknowledgement_is_not_answered() -> None:
    stream = Stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    assert stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce)) == []


def test_a_new_name_is_answered_at_once_and_for_clusters_with_all_of_them() -> None:
    stream = Stream()
    (first,) = stream.ask(request(CLUSTER, "vectors"))
    assert sizes(stream.ask(request(CLUSTER, *SERVICES, nonce=first.nonce))) == [(CLUSTER, 2)]


def test_a_name_dropped_and_wanted_again_is_sent_again() -> None:
    stream = Stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    assert stream.ask(request(ENDPOINT, nonce=first.nonce)) == []
    assert sizes(stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce))) == [(ENDPOINT, 1)]


def test_a_refused_resource_is_counted_and_not_sent_again_until_it_changes() -> None:
    refusals = ads.NACKS.labels("ClusterLoadAssignment")
    before = refusals._value.get()
    stream = Stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    assert stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce, error="no")) == []
    assert refusals._value.get() == before + 1
    assert sizes(stream.publish(ONE)) == [(ENDPOINT, 1)]


def test_an_answer_to_an_older_response_is_none_to_the_present() -> None:
    accepted = ads.ACKS.labels("ClusterLoadAssignment")
    stream = Stream()
    (old,) = stream.ask(request(ENDPOINT, "vectors"))
    stream.publish(ONE)
    before = accepted._value.get()
    stream.ask(request(ENDPOINT, "vectors", nonce=old.nonce))
    assert accepted._value.get() == before


def test_a_client_that_reconnects_is_answered_whatever_version_it_has() -> None:
    current = ONE.versions[ENDPOINT]
    assert sizes(Stream(ONE).ask(request(ENDPOINT, "vectors", version=current))) == [(ENDPOINT, 1)]


@pytest.mark.parametrize("peer", ["cli", "edge"])
async def test_a_registration_reaches_a_subscriber(tmp_path: Path, serve: Serve, peer: str) -> None:
    snapshots = ads.Snapshots()
    async with LocalRegistry(tmp_path / "catalogue.json") as registry:
        publishing = asyncio.create_task(main._publish(registry, snapshots, set(SERVICES)))
        try:
            async with serve(lambda server: ads.add_to_server(snapshots, server), peer=peer) as channel:
                call: Any = channel.stream_stream(
                    f"/{ads.SERVICE}/{ads.METHOD}",
                    request_serializer=xds_pb2.DiscoveryRequest.SerializeToString,
                    response_deserializer=xds_pb2.DiscoveryResponse.FromString,
                )()
                await call.write(request(ENDPOINT, "vectors"))
                async with asyncio.timeout(10):
                    first = await call.read()
                    assert first.resources[0] == EMPTY.resources[ENDPOINT]["vectors"]
                    await registry.register(instance(), lease_s=LEASE_S)
                    assert (await call.read()).resources[0] == ONE.resources[ENDPOINT]["vectors"]
                call.cancel()
        finally:
            publishing.cancel()


async def test_a_name_once_published_stays_with_an_address_that_refuses(tmp_path: Path) -> None:
    snapshots = ads.Snapshots()
    names = set(SERVICES)
    async with LocalRegistry(tmp_path / "catalogue.json") as registry:
        await registry.register(instance(service="orders"), lease_s=LEASE_S)
        await main._publish_once(registry, snapshots, names)
        await registry.deregister("orders-1")
        await main._publish_once(registry, snapshots, names)
    packed = snapshots.current.resources[ENDPOINT]["orders"]
    assignment = xds_pb2.ClusterLoadAssignment.FromString(packed.value)
    (entry,) = assignment.endpoints[0].lb_endpoints
    socket = entry.endpoint.address.socket_address
    assert (socket.address, socket.port_value) == TOMBSTONE
