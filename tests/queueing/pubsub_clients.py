"""Google's own Pub/Sub client on a broker of the test's own."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.cloud import pubsub_v1

from services.queueing.faces.pubsub import Face
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig
from services.runtime.pipeline import Pipeline
from services.runtime.service import server_options

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 90.0


class Server(threading.Thread):
    """A broker and its face on an event loop of its own, since the client blocks."""

    def __init__(self, make: Any, port: int = 0) -> None:
        """Set it up.

        Args:
            make: Makes the broker.
            port: Where it listens; 0 is any.
        """
        super().__init__(daemon=True)
        self._make = make
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self.port: queue.Queue[int] = queue.Queue()

    def address(self) -> str:
        """Where it listens, once it does."""
        port = self.port.get(timeout=WAIT_S)
        self.port.put(port)
        return f"127.0.0.1:{port}"

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with self._make() as broker:
            limits = ServerConfig()
            pipeline = Pipeline("queueing", limits, AllowAll(), trusted_peer="pubsub")
            server = grpc.aio.server(interceptors=[pipeline], options=server_options(limits))
            stopping = asyncio.Event()
            face = Face(broker, stopping, max_bytes=limits.max_message_bytes)
            server.add_generic_rpc_handlers((face,))
            port = server.add_insecure_port(f"127.0.0.1:{self._port}")
            await server.start()
            self.port.put(port)
            await self._ended.wait()
            stopping.set()
            await server.stop(grace=1)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join(WAIT_S)


@dataclass
class Clients:
    address: str
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


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def pubsub_clients(address: str) -> Iterator[Clients]:
    """Clients with only PUBSUB_EMULATOR_HOST set, and a topic `jobs`."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PUBSUB_EMULATOR_HOST", address)
        options = pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
        publisher = pubsub_v1.PublisherClient(publisher_options=options)
        clients = Clients(address, publisher, pubsub_v1.SubscriberClient())
    clients.publisher.create_topic(name=clients.topic("jobs"))
    try:
        yield clients
    finally:
        clients.publisher.stop()
        clients.publisher.transport.close()
        clients.subscriber.close()
