"""Exactly-once delivery as Google's client sees it: which acknowledgements count, and which did not."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import pytest
from google.api_core import exceptions
from google.cloud.pubsub_v1 import types
from google.cloud.pubsub_v1.subscriber.exceptions import AcknowledgeError, AcknowledgeStatus
from google.rpc import error_details_pb2

from services.queueing.faces.pubsub_leases import INVALID
from tests.queueing.pubsub_clients import WAIT_S

if TYPE_CHECKING:
    from tests.queueing.pubsub_clients import Clients

pytestmark = pytest.mark.timeout(400)


def failures(error: exceptions.GoogleAPICallError) -> dict[str, str]:
    """What an error says of each id."""
    (info,) = [detail for detail in error.details if isinstance(detail, error_details_pb2.ErrorInfo)]
    return dict(info.metadata)


def pulled(clients: Clients, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        found += clients.pull()
    return found


def acknowledge(clients: Clients, *ack_ids: str) -> None:
    clients.subscriber.acknowledge(subscription=clients.subscription("work"), ack_ids=ack_ids)


def test_the_client_learns_that_an_acknowledgement_counts(clients: Clients) -> None:
    made = clients.subscribe(enable_exactly_once_delivery=True, ack_deadline_seconds=60)
    assert made.enable_exactly_once_delivery
    got: queue.Queue[Any] = queue.Queue()

    def handle(message: Any) -> None:
        got.put((message.data, message.ack_with_response()))

    streaming = clients.subscriber.subscribe(clients.subscription("work"), callback=handle)
    for n in range(20):
        clients.publisher.publish(clients.topic("jobs"), b"%d" % n)
    found = [got.get(timeout=WAIT_S) for _ in range(20)]
    assert {future.result(WAIT_S) for _, future in found} == {AcknowledgeStatus.SUCCESS}
    streaming.cancel()
    streaming.result(WAIT_S)
    assert {data for data, _ in found} == {b"%d" % n for n in range(20)}
    assert got.empty()


def test_the_client_learns_that_its_lease_had_ended(clients: Clients) -> None:
    clients.subscribe(enable_exactly_once_delivery=True)
    got: queue.Queue[Any] = queue.Queue()
    flow = types.FlowControl(max_messages=10)
    streaming = clients.subscriber.subscribe(
        clients.subscription("work"), callback=got.put, flow_control=flow
    )
    clients.publisher.publish(clients.topic("jobs"), b"a").result(WAIT_S)
    first = got.get(timeout=WAIT_S)
    clients.subscriber.modify_ack_deadline(
        subscription=clients.subscription("work"), ack_ids=[first.ack_id], ack_deadline_seconds=0
    )
    again = got.get(timeout=WAIT_S)
    assert again.message_id == first.message_id
    with pytest.raises(AcknowledgeError) as caught:
        first.ack_with_response().result(WAIT_S)
    assert caught.value.error_code is AcknowledgeStatus.INVALID_ACK_ID
    assert again.ack_with_response().result(WAIT_S) is AcknowledgeStatus.SUCCESS
    streaming.cancel()
    streaming.result(WAIT_S)


def test_an_ended_lease_fails_for_good_and_an_answer_that_was_lost_may_be_asked_for_again(
    clients: Clients,
) -> None:
    clients.subscribe(enable_exactly_once_delivery=True)
    for data in (b"a", b"b"):
        clients.publisher.publish(clients.topic("jobs"), data).result(WAIT_S)
    one, two = pulled(clients, 2)
    clients.subscriber.modify_ack_deadline(
        subscription=clients.subscription("work"), ack_ids=[one.ack_id], ack_deadline_seconds=0
    )
    with pytest.raises(exceptions.InvalidArgument) as all_ended:
        acknowledge(clients, one.ack_id, "invented")
    assert failures(all_ended.value) == {one.ack_id: INVALID, "invented": INVALID}
    # An error that passes: what it does not name is sent again, and was done already.
    with pytest.raises(exceptions.Aborted) as some_ended:
        acknowledge(clients, one.ack_id, two.ack_id)
    assert failures(some_ended.value) == {one.ack_id: INVALID}
    acknowledge(clients, two.ack_id)
    with pytest.raises(exceptions.InvalidArgument):
        clients.subscriber.modify_ack_deadline(
            subscription=clients.subscription("work"), ack_ids=[two.ack_id], ack_deadline_seconds=60
        )
    (again,) = pulled(clients, 1)
    assert again.message.data == one.message.data
    acknowledge(clients, again.ack_id)


def test_more_ended_leases_than_one_error_can_name_are_told_in_turn(sqlite_clients: Clients) -> None:
    sqlite_clients.subscribe(enable_exactly_once_delivery=True)
    left = {f"invented-{n}" for n in range(1000)}
    while left:
        with pytest.raises((exceptions.Aborted, exceptions.InvalidArgument)) as caught:
            acknowledge(sqlite_clients, *left)
        told = failures(caught.value)
        assert told
        assert set(told) <= left
        left -= set(told)


def test_without_the_setting_nothing_is_told(sqlite_clients: Clients) -> None:
    sqlite_clients.subscribe()
    acknowledge(sqlite_clients, "invented")
    name = sqlite_clients.subscription("work")
    sqlite_clients.subscriber.update_subscription(
        subscription={"name": name, "enable_exactly_once_delivery": True},
        update_mask={"paths": ["enable_exactly_once_delivery"]},
    )
    with pytest.raises(exceptions.InvalidArgument):
        acknowledge(sqlite_clients, "invented")


def test_what_is_said_on_the_stream_is_confirmed_on_the_stream(sqlite_clients: Clients) -> None:
    sqlite_clients.subscribe(enable_exactly_once_delivery=True)
    sqlite_clients.publisher.publish(sqlite_clients.topic("jobs"), b"a").result(WAIT_S)
    said: queue.Queue[Any] = queue.Queue()
    first = {
        "subscription": sqlite_clients.subscription("work"),
        "stream_ack_deadline_seconds": 60,
        "protocol_version": 1,
    }
    said.put(types.StreamingPullRequest(first))
    stream = sqlite_clients.subscriber.streaming_pull(requests=iter(said.get, None), timeout=WAIT_S)
    opened = next(stream)
    assert opened.subscription_properties.exactly_once_delivery_enabled
    (message,) = next(stream).received_messages
    said.put(
        types.StreamingPullRequest(
            modify_deadline_ack_ids=[message.ack_id, "x"], modify_deadline_seconds=[99, 99]
        )
    )
    modified = next(stream).modify_ack_deadline_confirmation
    assert (modified.ack_ids, modified.invalid_ack_ids) == ([message.ack_id], ["x"])
    said.put(types.StreamingPullRequest(ack_ids=[message.ack_id, "y"]))
    acknowledged = next(stream).acknowledge_confirmation
    assert (acknowledged.ack_ids, acknowledged.invalid_ack_ids) == ([message.ack_id], ["y"])
    said.put(types.StreamingPullRequest())  # the keepalive of newer clients, which wait for an answer
    assert next(stream).subscription_properties.exactly_once_delivery_enabled
    said.put(None)
    assert list(stream) == []  # who has said its last is let go
