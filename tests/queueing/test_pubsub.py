"""Google's own Pub/Sub client, unchanged, with only PUBSUB_EMULATOR_HOST set, on either backend."""

from __future__ import annotations

import queue
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherClient

from tests.queueing.pubsub_clients import WAIT_S

if TYPE_CHECKING:
    from tests.queueing.pubsub_clients import Clients

# The client's threads outlive their streams by a little; the server of the second backend may have to start.
pytestmark = pytest.mark.timeout(400)


def test_messages_go_from_the_publisher_to_a_streaming_subscriber(clients: Clients) -> None:
    clients.subscribe()
    got: queue.Queue[Any] = queue.Queue()

    def handle(message: Any) -> None:
        got.put((message.data, dict(message.attributes), message.message_id))
        message.ack()

    future = clients.subscriber.subscribe(clients.subscription("work"), callback=handle)
    sent = {
        clients.publisher.publish(clients.topic("jobs"), b"%d" % n, n=str(n)).result(WAIT_S): n
        for n in range(50)
    }
    found = [got.get(timeout=WAIT_S) for _ in sent]
    future.cancel()
    future.result(timeout=WAIT_S)
    assert {message_id: int(data) for data, _, message_id in found} == sent
    assert all(attributes == {"n": data.decode()} for data, attributes, _ in found)


def test_a_stream_goes_on_past_its_flow_control(clients: Clients) -> None:
    clients.subscribe()
    got: queue.Queue[bytes] = queue.Queue()

    def handle(message: Any) -> None:
        got.put(message.data)
        message.ack()

    flow = pubsub_v1.types.FlowControl(max_messages=5)
    for n in range(60):
        clients.publisher.publish(clients.topic("jobs"), b"%d" % n)
    future = clients.subscriber.subscribe(clients.subscription("work"), callback=handle, flow_control=flow)
    found = {got.get(timeout=WAIT_S) for _ in range(60)}
    future.cancel()
    future.result(timeout=WAIT_S)
    assert found == {b"%d" % n for n in range(60)}


def test_pull_acknowledge_and_refuse(clients: Clients) -> None:
    clients.subscribe()
    for data in (b"a", b"b"):
        clients.publisher.publish(clients.topic("jobs"), data).result(WAIT_S)
    found: list[Any] = []
    while len(found) < 2:
        found += clients.pull()
    by_data = {entry.message.data: entry.ack_id for entry in found}
    subscription = clients.subscription("work")
    clients.subscriber.acknowledge(subscription=subscription, ack_ids=[by_data[b"a"], "invented"])
    clients.subscriber.modify_ack_deadline(
        subscription=subscription, ack_ids=[by_data[b"b"]], ack_deadline_seconds=0
    )
    (again,) = clients.pull()
    assert (again.message.data, again.delivery_attempt) == (b"b", 0)


def test_order_is_kept_by_key(clients: Clients) -> None:
    clients.subscribe(enable_message_ordering=True)
    for n in range(10):
        clients.publisher.publish(clients.topic("jobs"), b"%d" % n, ordering_key="k")
    got: list[int] = []
    done = threading.Event()

    def handle(message: Any) -> None:
        got.append(int(message.data))
        assert message.ordering_key == "k"
        message.ack()
        if len(got) == 10:
            done.set()

    future = clients.subscriber.subscribe(clients.subscription("work"), callback=handle)
    assert done.wait(WAIT_S)
    future.cancel()
    future.result(timeout=WAIT_S)
    assert got == list(range(10))


def test_a_message_refused_too_often_goes_to_the_dead_letter_topic(clients: Clients) -> None:
    clients.publisher.create_topic(name=clients.topic("graves"))
    clients.subscribe("mourner", "graves")
    policy = {"dead_letter_topic": clients.topic("graves"), "max_delivery_attempts": 5}
    clients.subscribe(dead_letter_policy=policy)
    clients.publisher.publish(clients.topic("jobs"), b"poison").result(WAIT_S)
    for attempt in range(1, 6):
        (entry,) = clients.pull()
        assert entry.delivery_attempt == attempt
        clients.subscriber.modify_ack_deadline(
            subscription=clients.subscription("work"), ack_ids=[entry.ack_id], ack_deadline_seconds=0
        )
    (grave,) = clients.pull("mourner")
    assert grave.message.data == b"poison"


def test_a_filter_chooses(clients: Clients) -> None:
    clients.subscribe(filter='attributes.kind = "a"')
    for kind in ("b", "a"):
        clients.publisher.publish(clients.topic("jobs"), kind.encode(), kind=kind).result(WAIT_S)
    assert [entry.message.data for entry in clients.pull()] == [b"a"]


def test_settings_are_kept_listed_and_changed(clients: Clients) -> None:
    made = clients.subscribe(ack_deadline_seconds=30, labels={"team": "a"})
    name = clients.subscription("work")
    assert clients.subscriber.get_subscription(subscription=name) == made
    assert (made.ack_deadline_seconds, made.labels["team"], made.topic) == (30, "a", clients.topic("jobs"))
    changed = clients.subscriber.update_subscription(
        subscription={"name": name, "ack_deadline_seconds": 60},
        update_mask={"paths": ["ack_deadline_seconds"]},
    )
    assert (changed.ack_deadline_seconds, changed.labels["team"]) == (60, "a")
    clients.publisher.create_topic(name=clients.topic("jobs", "other"))
    topics = [topic.name for topic in clients.publisher.list_topics(project="projects/acme")]
    assert topics == [clients.topic("jobs")]
    listed = clients.subscriber.list_subscriptions(project="projects/acme")
    assert [subscription.name for subscription in listed] == [name]
    assert list(clients.publisher.list_topic_subscriptions(topic=clients.topic("jobs"))) == [name]
    clients.publisher.delete_topic(topic=clients.topic("jobs"))
    assert clients.subscriber.get_subscription(subscription=name).topic == "_deleted-topic_"


def test_a_subscription_is_sought_past_what_is_waiting(clients: Clients) -> None:
    clients.subscribe()
    clients.publisher.publish(clients.topic("jobs"), b"old").result(WAIT_S)
    target = datetime.now(UTC) + timedelta(hours=1)
    clients.subscriber.seek(request={"subscription": clients.subscription("work"), "time": target})
    clients.publisher.publish(clients.topic("jobs"), b"new").result(WAIT_S)
    assert [entry.message.data for entry in clients.pull()] == [b"new"]


def test_seek_to_a_past_time_brings_nothing_back_and_keeps_what_is_waiting(clients: Clients) -> None:
    clients.subscribe()
    work = clients.subscription("work")
    clients.publisher.publish(clients.topic("jobs"), b"done").result(WAIT_S)
    (done,) = clients.pull()
    clients.subscriber.acknowledge(subscription=work, ack_ids=[done.ack_id])
    clients.publisher.publish(clients.topic("jobs"), b"waiting").result(WAIT_S)
    target = datetime.now(UTC) - timedelta(hours=1)
    clients.subscriber.seek(request={"subscription": work, "time": target})
    assert [entry.message.data for entry in clients.pull()] == [b"waiting"]


def test_what_a_subscription_retains_is_sought_back(clients: Clients) -> None:
    made = clients.subscribe(retain_acked_messages=True, message_retention_duration=timedelta(hours=1))
    assert (made.retain_acked_messages, made.message_retention_duration) == (True, timedelta(hours=1))
    work = clients.subscription("work")
    clients.publisher.publish(clients.topic("jobs"), b"done").result(WAIT_S)
    for _ in range(2):
        (done,) = clients.pull()
        assert done.message.data == b"done"
        clients.subscriber.acknowledge(subscription=work, ack_ids=[done.ack_id])
        target = datetime.now(UTC) - timedelta(minutes=30)
        clients.subscriber.seek(request={"subscription": work, "time": target})


def test_an_expiration_policy_is_kept_and_changed(sqlite_clients: Clients) -> None:
    made = sqlite_clients.subscribe(expiration_policy={"ttl": timedelta(days=2)})
    assert made.expiration_policy.ttl == timedelta(days=2)
    name = sqlite_clients.subscription("work")
    for days in (3, None):
        policy = {"ttl": timedelta(days=days)} if days else {}
        changed = sqlite_clients.subscriber.update_subscription(
            subscription={"name": name, "expiration_policy": policy},
            update_mask={"paths": ["expiration_policy"]},
        )
        assert changed.expiration_policy.ttl == (timedelta(days=days) if days else timedelta())
        assert sqlite_clients.subscriber.get_subscription(subscription=name) == changed
    assert "ttl" not in changed.expiration_policy
    with pytest.raises(exceptions.InvalidArgument):
        sqlite_clients.subscribe("short", expiration_policy={"ttl": timedelta(hours=23)})


def test_a_batch_with_one_bad_message_is_refused_whole(clients: Clients) -> None:
    clients.subscribe()
    plain = PublisherClient(transport=clients.publisher.transport)
    with pytest.raises(exceptions.InvalidArgument, match=r"messages\[1\]|needs data"):
        plain.publish(request={"topic": clients.topic("jobs"), "messages": [{"data": b"good"}, {}]})
    plain.publish(request={"topic": clients.topic("jobs"), "messages": [{"data": b"after"}]})
    assert [entry.message.data for entry in clients.pull()] == [b"after"]


def test_a_subscription_is_set_back_to_a_snapshot(clients: Clients) -> None:
    clients.subscribe()
    clients.publisher.publish(clients.topic("jobs"), b"held").result(WAIT_S)
    name = clients.subscriber.snapshot_path("acme", "before")
    made = clients.subscriber.create_snapshot(name=name, subscription=clients.subscription("work"))
    assert (made.name, made.topic) == (name, clients.topic("jobs"))
    clients.publisher.publish(clients.topic("jobs"), b"later").result(WAIT_S)
    for _ in range(2):
        found: dict[bytes, str] = {}
        while len(found) < 2:
            found |= {entry.message.data: entry.ack_id for entry in clients.pull()}
        assert set(found) == {b"held", b"later"}
        clients.subscriber.acknowledge(
            subscription=clients.subscription("work"), ack_ids=list(found.values())
        )
        clients.subscriber.seek(request={"subscription": clients.subscription("work"), "snapshot": name})


def test_snapshots_are_kept_listed_changed_and_deleted(clients: Clients) -> None:
    clients.subscribe()
    one, two = (clients.subscriber.snapshot_path("acme", name) for name in ("one", "two"))
    for name in (one, two):
        request = {"name": name, "subscription": clients.subscription("work"), "labels": {"k": "v"}}
        clients.subscriber.create_snapshot(request=request)
    with pytest.raises(exceptions.AlreadyExists):
        clients.subscriber.create_snapshot(name=one, subscription=clients.subscription("work"))
    listed = clients.subscriber.list_snapshots(project="projects/acme")
    assert [snapshot.name for snapshot in listed] == [one, two]
    assert list(clients.subscriber.list_snapshots(project="projects/other")) == []
    assert list(clients.publisher.list_topic_snapshots(topic=clients.topic("jobs"))) == [one, two]
    soon = datetime.now(UTC) + timedelta(hours=2)
    changed = clients.subscriber.update_snapshot(
        request={
            "snapshot": {"name": one, "expire_time": soon, "labels": {}},
            "update_mask": {"paths": ["expire_time", "labels"]},
        }
    )
    assert clients.subscriber.get_snapshot(snapshot=one) == changed
    assert (abs(changed.expire_time - soon) < timedelta(seconds=1), dict(changed.labels)) == (True, {})
    clients.subscriber.delete_snapshot(snapshot=one)
    with pytest.raises(exceptions.NotFound):
        clients.subscriber.get_snapshot(snapshot=one)


def test_errors_are_those_of_pubsub(clients: Clients) -> None:
    clients.subscribe()
    with pytest.raises(exceptions.AlreadyExists):
        clients.publisher.create_topic(name=clients.topic("jobs"))
    with pytest.raises(exceptions.AlreadyExists):
        clients.subscribe()
    with pytest.raises(exceptions.NotFound):
        clients.publisher.publish(clients.topic("nothing"), b"x").result(WAIT_S)
    with pytest.raises(exceptions.NotFound):
        clients.pull("nothing")
    with pytest.raises(exceptions.InvalidArgument):
        clients.subscribe("bad", filter="nonsense")
    with pytest.raises(exceptions.InvalidArgument):
        clients.publisher.create_topic(name="projects/acme/topics/")


@pytest.mark.parametrize(
    "settings",
    [
        {"push_config": {"push_endpoint": "https://example.org"}},
        {"push_config": {"no_wrapper": {"write_metadata": True}}},
        {"bigquery_config": {"table": "p.d.t"}},
        {"cloud_storage_config": {"bucket": "b"}},
        {"message_transforms": [{"disabled": True}]},
        {"tags": {"a": "b"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_subscription_cannot_have_is_refused(sqlite_clients: Clients, settings: Any) -> None:
    with pytest.raises(exceptions.MethodNotImplemented) as caught:
        sqlite_clients.subscribe(**settings)
    assert caught.value.reason == "PUBSUB_FIELD_UNSUPPORTED"
    if "push_config" in settings:
        sqlite_clients.subscribe()
        with pytest.raises(exceptions.MethodNotImplemented):
            sqlite_clients.subscriber.modify_push_config(
                subscription=sqlite_clients.subscription("work"), **settings
            )


@pytest.mark.parametrize(
    "settings",
    [
        {"kms_key_name": "key"},
        {"schema_settings": {"schema": "projects/acme/schemas/s"}},
        {"message_storage_policy": {"allowed_persistence_regions": ["eu"]}},
        {"ingestion_data_source_settings": {"cloud_storage": {"bucket": "b"}}},
        {"message_transforms": [{"disabled": True}]},
        {"tags": {"a": "b"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_topic_cannot_have_is_refused(sqlite_clients: Clients, settings: Any) -> None:
    with pytest.raises(exceptions.MethodNotImplemented):
        sqlite_clients.publisher.create_topic(request={"name": sqlite_clients.topic("other"), **settings})


def test_a_detached_subscription_gives_nothing(clients: Clients) -> None:
    clients.subscribe()
    clients.publisher.detach_subscription(request={"subscription": clients.subscription("work")})
    assert clients.subscriber.get_subscription(subscription=clients.subscription("work")).detached
    with pytest.raises(exceptions.FailedPrecondition):
        clients.pull()
