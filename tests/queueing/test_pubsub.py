"""Google's own Pub/Sub client, unchanged, with only PUBSUB_EMULATOR_HOST set, on either backend."""

from __future__ import annotations

import asyncio
import queue
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1

from services.queueing.backends.rabbit import RabbitBroker
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.faces import pubsub
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The client's threads outlive their streams by a little; the server of the second backend may have to start.
pytestmark = pytest.mark.timeout(400)
WAIT_S = 60.0


class _Server(threading.Thread):
    """A broker and its face on an event loop of its own, since the client blocks."""

    def __init__(self, make: Any) -> None:
        super().__init__(daemon=True)
        self._make = make
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self.port: queue.Queue[int] = queue.Queue()

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with self._make() as broker:
            pipeline = Pipeline("queueing", ServerConfig(), AllowAll(), trusted_peer="pubsub")
            server = grpc.aio.server(interceptors=[pipeline])
            pubsub.add_to(server, broker)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            self.port.put(port)
            await self._ended.wait()
            await server.stop(grace=1)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join(WAIT_S)


@dataclass
class Clients:
    publisher: pubsub_v1.PublisherClient
    subscriber: pubsub_v1.SubscriberClient

    def topic(self, name: str, project: str = "acme") -> str:
        path: str = self.publisher.topic_path(project, name)
        return path

    def subscription(self, name: str, project: str = "acme") -> str:
        path: str = self.subscriber.subscription_path(project, name)
        return path

    def subscribe(self, name: str = "work", topic: str = "jobs", **settings: Any) -> Any:
        request = {"name": self.subscription(name), "topic": self.topic(topic), **settings}
        return self.subscriber.create_subscription(request=request)

    def pull(self, name: str = "work", count: int = 100) -> list[Any]:
        request = {"subscription": self.subscription(name), "max_messages": count}
        return list(self.subscriber.pull(request=request, timeout=WAIT_S).received_messages)


@pytest.fixture(params=["sqlite", "rabbitmq"])
def clients(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Clients]:
    if request.param == "rabbitmq":
        rabbitmq = request.getfixturevalue("rabbitmq")
        vhost = request.getfixturevalue("rabbitmq_vhost")
        url = rabbitmq.url(vhost)
        server = _Server(lambda: RabbitBroker(url, tmp_path / "state.sqlite"))
    else:
        server = _Server(lambda: SqliteBroker(tmp_path / "queue.sqlite"))
    server.start()
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{server.port.get(timeout=WAIT_S)}")
    options = pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
    clients = Clients(pubsub_v1.PublisherClient(publisher_options=options), pubsub_v1.SubscriberClient())
    clients.publisher.create_topic(name=clients.topic("jobs"))
    try:
        yield clients
    finally:
        clients.publisher.stop()
        clients.publisher.transport.close()
        clients.subscriber.close()
        server.stop()


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


def test_errors_are_those_of_pubsub(clients: Clients) -> None:
    clients.subscribe()
    with pytest.raises(exceptions.AlreadyExists):
        clients.publisher.create_topic(name=clients.topic("jobs"))
    with pytest.raises(exceptions.AlreadyExists):
        clients.subscribe(ack_deadline_seconds=99)
    with pytest.raises(exceptions.NotFound):
        clients.publisher.publish(clients.topic("nothing"), b"x").result(WAIT_S)
    with pytest.raises(exceptions.NotFound):
        clients.pull("nothing")
    with pytest.raises(exceptions.InvalidArgument):
        clients.subscribe("bad", filter="nonsense")
    with pytest.raises(exceptions.InvalidArgument):
        clients.publisher.create_topic(name="projects/acme/topics/")
    with pytest.raises(exceptions.MethodNotImplemented):
        clients.subscribe("once", enable_exactly_once_delivery=True)
    with pytest.raises(exceptions.MethodNotImplemented):
        clients.subscribe("push", push_config={"push_endpoint": "https://example.org"})
    with pytest.raises(exceptions.MethodNotImplemented):
        clients.subscriber.create_snapshot(
            name="projects/acme/snapshots/s", subscription=clients.subscription("work")
        )


def test_a_detached_subscription_gives_nothing(clients: Clients) -> None:
    clients.subscribe()
    clients.publisher.detach_subscription(request={"subscription": clients.subscription("work")})
    assert clients.subscriber.get_subscription(subscription=clients.subscription("work")).detached
    with pytest.raises(exceptions.FailedPrecondition):
        clients.pull()
