"""What Google's client does beside the usual: restarts, large messages, many in flight, failures of order."""

from __future__ import annotations

import os
import queue
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from tests.ports import free_port
from tests.queueing.pubsub_clients import WAIT_S, Server, pubsub_clients, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.queueing.pubsub_clients import Clients

pytestmark = pytest.mark.timeout(400)


def test_a_subscriber_and_a_publisher_go_on_over_a_restart(make_broker: Callable[[], Any]) -> None:
    port = free_port()
    got: queue.Queue[bytes] = queue.Queue()

    def handle(message: Any) -> None:
        got.put(message.data)
        message.ack()

    first = Server(make_broker, port)
    first.start()
    with pubsub_clients(first.address()) as clients:
        try:
            clients.subscribe()
            streaming = clients.subscriber.subscribe(clients.subscription("work"), callback=handle)
            clients.publisher.publish(clients.topic("jobs"), b"before").result(WAIT_S)
            assert got.get(timeout=WAIT_S) == b"before"
        finally:
            first.stop()
        meanwhile = clients.publisher.publish(clients.topic("jobs"), b"meanwhile")
        with serving(Server(make_broker, port)):
            meanwhile.result(WAIT_S)
            while got.get(timeout=WAIT_S) != b"meanwhile":
                pass
            assert streaming.running()
            streaming.cancel()
            streaming.result(WAIT_S)


def test_much_content_at_once_stays_below_what_the_client_takes(clients: Clients) -> None:
    clients.subscribe()
    got: queue.Queue[bytes] = queue.Queue()

    def handle(message: Any) -> None:
        got.put(message.data)
        message.ack()

    contents = [bytes([n]) * 1_500_000 for n in range(12)]
    for data in contents:
        clients.publisher.publish(clients.topic("jobs"), data).result(WAIT_S)
    streaming = clients.subscriber.subscribe(clients.subscription("work"), callback=handle)
    found = {got.get(timeout=WAIT_S) for _ in contents}
    streaming.cancel()
    streaming.result(WAIT_S)
    assert found == set(contents)


def test_the_largest_message_goes_through(clients: Clients) -> None:
    clients.subscribe()
    # Google's own client refuses more than 10 MB in one request, with all that is around the content.
    data = os.urandom(10_000_000 - 4096)
    clients.publisher.publish(clients.topic("jobs"), data).result(WAIT_S)
    # As an emulator's client it takes 4 MiB at most; elsewhere it has no such bound.
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(clients.address, options) as channel:
        subscriber = pubsub_v1.SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        request = {"subscription": clients.subscription("work"), "max_messages": 10}
        found: list[Any] = []
        while not found:
            found += subscriber.pull(request=request, timeout=WAIT_S).received_messages
    assert found[0].message.data == data


def test_a_thousand_messages_are_held_at_once(clients: Clients) -> None:
    clients.subscribe(ack_deadline_seconds=600)
    held: queue.Queue[Any] = queue.Queue()
    batch = pubsub_v1.types.BatchSettings(max_messages=100, max_latency=0.05)
    publisher = pubsub_v1.PublisherClient(batch, transport=clients.publisher.transport)
    sent = [publisher.publish(clients.topic("jobs"), b"%d" % n) for n in range(1000)]
    assert len({future.result(WAIT_S) for future in sent}) == 1000
    flow = pubsub_v1.types.FlowControl(max_messages=1000)
    streaming = clients.subscriber.subscribe(
        clients.subscription("work"), callback=held.put, flow_control=flow
    )
    found = [held.get(timeout=WAIT_S) for _ in range(1000)]
    for message in found:
        message.ack()
    streaming.cancel()
    streaming.result(WAIT_S)
    assert len({message.message_id for message in found}) == 1000


def test_a_key_is_paused_after_a_failure_until_it_is_resumed(sqlite_clients: Clients) -> None:
    topic, publisher = sqlite_clients.topic("jobs"), sqlite_clients.publisher
    publisher.delete_topic(topic=topic)
    with pytest.raises(exceptions.NotFound):
        publisher.publish(topic, b"x", ordering_key="k").result(WAIT_S)
    publisher.create_topic(name=topic)
    with pytest.raises(pubsub_v1.publisher.exceptions.PublishToPausedOrderingKeyException):
        publisher.publish(topic, b"x", ordering_key="k").result(WAIT_S)
    publisher.resume_publish(topic, "k")
    assert publisher.publish(topic, b"x", ordering_key="k").result(WAIT_S)


def test_a_subscriber_that_is_closed_gives_back_what_it_has(clients: Clients) -> None:
    clients.subscribe(ack_deadline_seconds=600)
    for n in range(20):
        clients.publisher.publish(clients.topic("jobs"), b"%d" % n).result(WAIT_S)
    one: queue.Queue[Any] = queue.Queue()

    def refuse(message: Any) -> None:
        one.put(message)
        message.nack()

    # What the client was sent and has not begun with is free when this is over.
    flow = pubsub_v1.types.FlowControl(max_duration_per_lease_extension=10)
    streaming = clients.subscriber.subscribe(clients.subscription("work"), callback=refuse, flow_control=flow)
    one.get(timeout=WAIT_S)
    streaming.cancel()
    streaming.result(WAIT_S)
    found: dict[bytes, str] = {}
    while len(found) < 20:
        found |= {entry.message.data: entry.ack_id for entry in clients.pull()}
