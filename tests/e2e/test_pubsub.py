"""Google Pub/Sub's official client through the edge: its own endpoint and a bearer token, nothing else."""

from __future__ import annotations

import queue
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
WAIT_S = 120.0
TOPIC, WORK = "projects/acme/topics/jobs", "projects/acme/subscriptions/work"


class _Details(grpc.ClientCallDetails):
    """Those of a call, with more metadata."""

    def __init__(self, details: Any, *metadata: tuple[str, str]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression
        self.metadata = (*(details.metadata or ()), *metadata)


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds a token. Over TLS the client's own `credentials` do; gRPC sends those over nothing less."""

    def __init__(self, token: str) -> None:
        self._metadata = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_Details(client_call_details, self._metadata), request)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(_Details(client_call_details, self._metadata), request_iterator)


@contextmanager
def clients(
    backend: Backend, consumer: str | None
) -> Iterator[tuple[pubsub_v1.PublisherClient, pubsub_v1.SubscriberClient]]:
    with grpc.insecure_channel(f"127.0.0.1:{backend.port}") as plain:
        channel = (
            grpc.intercept_channel(plain, _Bearer(backend.token(consumer))) if consumer is not None else plain
        )
        publisher = pubsub_v1.PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        subscriber = pubsub_v1.SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        yield publisher, subscriber
        publisher.stop()


def test_messages_go_through_the_edge_to_a_streaming_subscriber(backend: Backend) -> None:
    got: queue.Queue[Any] = queue.Queue()

    def handle(message: Any) -> None:
        got.put((message.data, message.ack_with_response()))

    with clients(backend, "demo") as (publisher, subscriber):
        publisher.create_topic(name=TOPIC)
        subscriber.create_subscription(
            request={"name": WORK, "topic": TOPIC, "enable_exactly_once_delivery": True}
        )
        streaming = subscriber.subscribe(WORK, callback=handle)
        for n in range(20):
            publisher.publish(TOPIC, b"%d" % n).result(WAIT_S)
        found = [got.get(timeout=WAIT_S) for _ in range(20)]
        assert {result.result(WAIT_S).name for _, result in found} == {"SUCCESS"}
        streaming.cancel()
        streaming.result(WAIT_S)
    assert {data for data, _ in found} == {b"%d" % n for n in range(20)}


def test_who_calls_needs_a_token_and_the_groups_of_the_method(backend: Backend) -> None:
    with clients(backend, None) as (publisher, _), pytest.raises(exceptions.Unauthenticated):
        publisher.get_topic(topic=TOPIC)
    with clients(backend, "admin") as (publisher, subscriber):
        publisher.create_topic(name=f"{TOPIC}-2")
    with clients(backend, "reader") as (publisher, subscriber):
        assert publisher.get_topic(topic=f"{TOPIC}-2").name == f"{TOPIC}-2"
        with pytest.raises(exceptions.PermissionDenied):
            publisher.publish(f"{TOPIC}-2", b"x").result(WAIT_S)
        with pytest.raises(exceptions.PermissionDenied):
            subscriber.create_subscription(name=f"{WORK}-2", topic=f"{TOPIC}-2")
        with pytest.raises(exceptions.PermissionDenied):
            subscriber.subscribe(f"{WORK}-2", callback=print).result(WAIT_S)
    with clients(backend, "demo") as (publisher, _), pytest.raises(exceptions.PermissionDenied):
        publisher.delete_topic(topic=f"{TOPIC}-2")  # for administrators
    with clients(backend, "admin") as (publisher, _):
        publisher.delete_topic(topic=f"{TOPIC}-2")
