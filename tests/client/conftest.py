"""A queueing service for its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.servicer import QueueingServicer
from tests.servers.queueing import QueueingServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.conftest import Serve


async def _prepare(stub: queueing_pb2_grpc.QueueingServiceStub) -> None:
    await stub.CreateTopic(pb.CreateTopicRequest(topic="jobs"))
    for name, ordered in (("work", False), ("ordered", True)):
        subscription = pb.Subscription(name=name, topic="jobs", ordered=ordered)
        subscription.retry.backoff = pb.BACKOFF_IMMEDIATE
        subscription.retry.max_attempts = 3
        await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))


@pytest.fixture
async def queueing(tmp_path: Path, serve: Serve) -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
    """A service in this process with the topic `jobs` and its subscriptions `work` and `ordered`."""
    async with (
        SqliteBroker(tmp_path / "queue.sqlite") as broker,
        Calls(broker) as calls,
        serve(
            lambda server: queueing_pb2_grpc.add_QueueingServiceServicer_to_server(
                QueueingServicer(broker, calls), server
            )
        ) as channel,
    ):
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        await _prepare(stub)
        yield stub


@pytest.fixture(params=["sqlite", "rabbitmq"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QueueingServer]:
    """A service in a process of its own, on each broker."""
    url = ""
    if request.param == "rabbitmq":
        vhost = request.getfixturevalue("rabbitmq_vhost")
        url = request.getfixturevalue("rabbitmq").url(vhost)
    with QueueingServer(tmp_path, url) as server:
        yield server


@pytest.fixture
async def killable(server: QueueingServer) -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
    """A stub of `server`, prepared as `queueing` is."""
    async with server.channel() as channel:
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        await _prepare(stub)
        yield stub
