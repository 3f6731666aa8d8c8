"""The discovery protocol: one stream's state, and a bare client over a real server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from google.rpc import status_pb2

from plexus.xds.v1 import xds_pb2
from services.mesh import main
from services.mesh.ads import client as ads_client
from services.mesh.ads import servicer
from services.mesh.ads.hub import Hub
from services.mesh.plane import MAX_UNKNOWN, Plane
from services.mesh.policy.domain import Document
from services.mesh.registry.local import LocalRegistry
from services.mesh.xds.endpoints import TOMBSTONE
from services.mesh.xds.resources import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE
from tests.contracts.registry import LEASE_S, instance

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Serve

SERVICES = ("vectors", "storage")


def request(
    type_url: str, *names: str, nonce: str = "", error: str = "", version: str = "", zone: str = ""
) -> xds_pb2.DiscoveryRequest:
    return xds_pb2.DiscoveryRequest(
        node=xds_pb2.Node(id="test", locality=xds_pb2.Locality(zone=zone)),
        version_info=version,
        type_url=type_url,
        resource_names=names,
        response_nonce=nonce,
        error_detail=status_pb2.Status(code=3, message=error) if error else None,
    )


class World:
    """A hub with a plane, without gRPC."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.plane = Plane(self.hub)
        self.plane.publish(SERVICES)

    def stream(self) -> Stream:
        return Stream(self)

    def instances(self, *numbers: int, service: str = "vectors") -> None:
        self.plane.set_instances({service: [instance(number, service=service) for number in numbers]})

    def policy(self, text: str, service: str = "vectors") -> None:
        self.plane.set_policies({service: Document("v.yaml", f"service: {service}\n{text}")})


class Stream:
    """One client's state."""

    def __init__(self, world: World) -> None:
        self.client = world.hub.connect("cli")
        self._hub = world.hub

    def ask(self, *requests: xds_pb2.DiscoveryRequest) -> list[xds_pb2.DiscoveryResponse]:
        for entry in requests:
            self.client.take(entry)
        return self.look()

    def look(self) -> list[xds_pb2.DiscoveryResponse]:
        return [xds_pb2.DiscoveryResponse.FromString(each.data) for each in self.client.responses()]

    def close(self) -> None:
        self._hub.disconnect(self.client)


@pytest.fixture
def world() -> World:
    return World()


def sizes(responses: list[xds_pb2.DiscoveryResponse]) -> list[tuple[str, int]]:
    return [(entry.type_url, len(entry.resources)) for entry in responses]


def addresses(response: xds_pb2.DiscoveryResponse) -> list[tuple[str, int]]:
    found = []
    for resource in response.resources:
        for place in xds_pb2.ClusterLoadAssignment.FromString(resource.value).endpoints:
            for entry in place.lb_endpoints:
                socket = entry.endpoint.address.socket_address
                found.append((socket.address, socket.port_value))
    return found


def test_clusters_go_first_and_routes_last_in_whatever_order_they_were_asked_for(world: World) -> None:
    asked = [
        request(url, "vectors-route" if url == ROUTE else "vectors")
        for url in (ROUTE, LISTENER, ENDPOINT, CLUSTER)
    ]
    assert [entry.type_url for entry in world.stream().ask(*asked)] == list(PUSH_ORDER)


def test_only_what_changed_is_sent_and_nothing_twice(world: World) -> None:
    stream = world.stream()
    first = stream.ask(request(CLUSTER, *SERVICES), request(ENDPOINT, *SERVICES))
    assert sizes(first) == [(CLUSTER, 2), (ENDPOINT, 2)]
    stream.ask(*(request(r.type_url, *SERVICES, nonce=r.nonce) for r in first))
    world.instances()
    assert stream.look() == []
    world.instances(1)
    assert sizes(stream.look()) == [(ENDPOINT, 1)]
    assert stream.look() == []


def test_a_change_wakes_the_clients_that_follow_it_and_no_other(world: World) -> None:
    vectors, storage = world.stream(), world.stream()
    vectors.ask(request(ENDPOINT, "vectors"))
    storage.ask(request(ENDPOINT, "storage"))
    for stream in (vectors, storage):
        stream.client.wake.clear()
    world.instances(1)
    assert vectors.client.wake.is_set()
    assert not storage.client.wake.is_set()


def test_all_clients_share_the_bytes_of_a_resource(world: World) -> None:
    world.instances(1)
    first, second = world.stream(), world.stream()
    first.ask(request(ENDPOINT, "vectors"))
    before = world.hub.get(ENDPOINT, "vectors")
    second.ask(request(ENDPOINT, "vectors"))
    assert world.hub.get(ENDPOINT, "vectors") is before


def test_while_a_response_is_unanswered_changes_gather_and_the_newest_state_is_sent(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    for number in (1, 2, 3):
        world.instances(number)
        assert stream.look() == []
    (second,) = stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce))
    assert addresses(second) == [("127.0.0.1", 4003)]


def test_an_acknowledgement_is_not_answered(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    assert stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce)) == []


def test_a_new_name_is_answered_at_once_and_for_clusters_with_all_of_them(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(CLUSTER, "vectors"))
    assert sizes(stream.ask(request(CLUSTER, *SERVICES, nonce=first.nonce))) == [(CLUSTER, 2)]
    (endpoints,) = stream.ask(request(ENDPOINT, "vectors"))
    assert sizes(stream.ask(request(ENDPOINT, *SERVICES, nonce=endpoints.nonce))) == [(ENDPOINT, 1)]


def test_a_name_dropped_and_wanted_again_is_sent_again(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    assert stream.ask(request(ENDPOINT, nonce=first.nonce)) == []
    assert sizes(stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce))) == [(ENDPOINT, 1)]


def test_names_in_a_request_with_an_old_nonce_count_all_the_same(world: World) -> None:
    stream = world.stream()
    (old,) = stream.ask(request(ENDPOINT, "vectors"))
    stream.ask(request(ENDPOINT, "vectors", nonce=old.nonce))
    world.instances(1)
    stream.look()
    assert sizes(stream.ask(request(ENDPOINT, *SERVICES, nonce=old.nonce))) == [(ENDPOINT, 1)]


def test_a_refused_resource_is_remembered_with_its_text_and_not_sent_again_until_it_changes(
    world: World,
) -> None:
    refusals = ads_client.NACKS.labels("ClusterLoadAssignment")
    before = refusals._value.get()
    stream = world.stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce))
    accepted = dict(stream.client.subscriptions[ENDPOINT].acked)
    world.instances(1)
    (second,) = stream.look()
    assert stream.ask(request(ENDPOINT, "vectors", nonce=second.nonce, error="no such thing")) == []
    assert refusals._value.get() == before + 1
    subscription = stream.client.subscriptions[ENDPOINT]
    assert subscription.refusal is not None
    assert subscription.refusal.text == "no such thing"
    assert subscription.acked == accepted != subscription.sent
    world.instances(2)
    (third,) = stream.look()
    stream.ask(request(ENDPOINT, "vectors", nonce=third.nonce))
    assert stream.client.subscriptions[ENDPOINT].refusal is None
    assert subscription.acked == subscription.sent


def test_an_answer_to_a_response_of_another_stream_is_none_to_the_present(world: World) -> None:
    accepted = ads_client.ACKS.labels("ClusterLoadAssignment")
    stream = world.stream()
    (first,) = stream.ask(request(ENDPOINT, "vectors"))
    before = accepted._value.get()
    stream.ask(request(ENDPOINT, "vectors", nonce=first.nonce + "0"))
    assert accepted._value.get() == before


@pytest.mark.parametrize("url", [ENDPOINT, ROUTE])
def test_a_response_about_nothing_is_never_sent(world: World, url: str) -> None:
    # Some take it for the deletion of all that they have.
    stream = world.stream()
    assert stream.ask(request(url, "No Service")) == []
    assert stream.ask(request(url)) == []


def test_a_client_that_reconnects_is_answered_whatever_version_it_has(world: World) -> None:
    version = str(world.hub.revision)
    answers = world.stream().ask(request(ENDPOINT, "vectors", version=version))
    assert sizes(answers) == [(ENDPOINT, 1)]


def test_after_a_reconnect_all_names_come_in_one_response(world: World) -> None:
    assert sizes(world.stream().ask(request(ENDPOINT, *SERVICES))) == [(ENDPOINT, 2)]


def test_a_client_that_asks_for_all_clusters_is_told_of_new_ones(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(CLUSTER))
    assert len(first.resources) == 2
    stream.ask(request(CLUSTER, nonce=first.nonce))
    world.instances(1, service="orders")
    assert sizes(stream.look()) == [(CLUSTER, 3)]


def test_an_unknown_service_is_published_at_once_with_an_address_that_refuses(world: World) -> None:
    stream = world.stream()
    answers = stream.ask(request(LISTENER, "nope"), request(ENDPOINT, "nope"))
    assert sizes(answers) == [(ENDPOINT, 1), (LISTENER, 1)]
    assert addresses(answers[0]) == [TOMBSTONE]
    assert world.stream().ask(request(ENDPOINT, "No Name")) == []
    for number in range(MAX_UNKNOWN + 5):
        world.plane.asked_for(f"n{number}")
    assert len(world.plane.services()) == len(SERVICES) + MAX_UNKNOWN


def test_clusters_of_a_dropped_subset_stay_while_a_client_follows_them(world: World) -> None:
    world.plane.set_instances(
        {"vectors": [replace(instance(1), version="1"), replace(instance(2), version="2")]}
    )
    world.policy("subsets: {a: {version: '1', weight: 9}, b: {version: '2', weight: 1}}")
    stream = world.stream()
    wanted = ("vectors~a", "vectors~b")
    (first,) = stream.ask(request(CLUSTER, *wanted))
    stream.ask(request(CLUSTER, *wanted, nonce=first.nonce))
    world.policy("subsets: {a: {version: '1', weight: 9}}")
    assert stream.look() == []
    assert world.hub.get(CLUSTER, "vectors~b") is not None
    assert world.hub.get(ENDPOINT, "vectors~b") is None
    stream.ask(request(CLUSTER, "vectors~a", nonce=first.nonce))
    assert world.hub.get(CLUSTER, "vectors~b") is None
    stream.close()
    assert world.hub.clients == set()


def test_clients_of_two_zones_get_their_own_order_of_zones(world: World) -> None:
    world.policy("locality: {}")
    world.plane.set_instances({"vectors": [replace(instance(1), zone="a"), replace(instance(2), zone="b")]})
    for zone, port in (("a", 4001), ("b", 4002)):
        (answer,) = world.stream().ask(request(ENDPOINT, "vectors", zone=zone))
        assert addresses(answer)[0] == ("127.0.0.1", port)


def test_a_bad_policy_changes_nothing_for_the_clients(world: World) -> None:
    stream = world.stream()
    (first,) = stream.ask(request(ROUTE, "vectors-route"))
    stream.ask(request(ROUTE, "vectors-route", nonce=first.nonce))
    world.policy("timeout: 3 apples")
    assert stream.look() == []
    world.policy("timeout: 3s")
    assert sizes(stream.look()) == [(ROUTE, 1)]


@pytest.mark.parametrize("peer", ["cli", "edge"])
async def test_a_registration_reaches_a_subscriber(
    tmp_path: Path, serve: Serve, peer: str, world: World
) -> None:
    async with LocalRegistry(tmp_path / "catalogue.json") as registry:
        following = asyncio.create_task(main.follow_catalogue(registry, world.plane))
        try:
            async with serve(lambda server: servicer.add_to_server(world.hub, server), peer=peer) as channel:
                call: Any = channel.stream_stream(
                    f"/{servicer.SERVICE}/{servicer.METHOD}",
                    request_serializer=xds_pb2.DiscoveryRequest.SerializeToString,
                    response_deserializer=xds_pb2.DiscoveryResponse.FromString,
                )()
                await call.write(request(ENDPOINT, "vectors"))
                async with asyncio.timeout(60):
                    first = await call.read()
                    assert addresses(first) == [TOMBSTONE]
                    await call.write(request(ENDPOINT, "vectors", nonce=first.nonce))
                    await registry.register(instance(), lease_s=LEASE_S)
                    assert addresses(await call.read()) == [("127.0.0.1", 4001)]
                    (client,) = world.hub.clients
                    assert client.peer == peer
                    call.cancel()
                    while world.hub.clients:  # noqa: ASYNC110 - the hub tells nobody of an end
                        await asyncio.sleep(0.01)
        finally:
            following.cancel()


def test_a_name_once_published_stays_with_an_address_that_refuses(world: World) -> None:
    world.instances(1, service="orders")
    world.instances(service="orders")
    stream = world.stream()
    (answer,) = stream.ask(request(ENDPOINT, "orders"))
    assert addresses(answer) == [TOMBSTONE]
