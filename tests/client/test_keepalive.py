"""A service that hangs: its kernel answers for it, and gRPC's pings do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest

import plexus.client
from plexus.client.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, keepalive
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.runtime.config import ServerConfig
from tests.servers.queueing import QueueingServer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(400)
LONG_S = 150.0
_PING_S = 1.0
"""The least that gRPC takes."""


def test_the_sdk_asks_less_often_than_servers_allow() -> None:
    assert ServerConfig().min_ping_interval_s * 1.5 <= KEEPALIVE_S
    assert KEEPALIVE_TIMEOUT_S < KEEPALIVE_S


async def test_a_subscriber_notices_a_frozen_service_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    handled: asyncio.Queue[bytes] = asyncio.Queue()
    broken: asyncio.Queue[Exception] = asyncio.Queue()

    async def handle(delivery: pb.Delivery) -> None:
        handled.put_nowait(delivery.data)

    with QueueingServer(tmp_path, min_ping_interval_s=_PING_S / 4) as server:
        async with (
            asyncio.timeout(LONG_S),
            server.channel(keepalive(_PING_S, 5 * _PING_S)) as channel,
            server.channel([("grpc.use_local_subchannel_pool", 1)]) as others,
        ):
            publishing = queueing_pb2_grpc.QueueingServiceStub(others)
            await publishing.CreateTopic(pb.CreateTopicRequest(topic="jobs"))
            subscription = pb.Subscription(name="work", topic="jobs")
            await publishing.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
            stub = queueing_pb2_grpc.QueueingServiceStub(channel)
            async with plexus.client.Subscriber(stub, "work", handle, on_error=broken.put_nowait):
                await publishing.Publish(
                    pb.PublishRequest(topic="jobs", messages=[pb.Message(data=b"before")])
                )
                assert await handled.get() == b"before"
                await asyncio.sleep(6 * _PING_S)  # a silence in which the service is asked often
                while not broken.empty():  # an answer may be late on a busy machine
                    assert "too many pings" not in str(broken.get_nowait()).casefold()
                server.pause()
                try:
                    error = await broken.get()
                finally:
                    server.resume()
                assert isinstance(error, grpc.aio.AioRpcError)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                await publishing.Publish(
                    pb.PublishRequest(topic="jobs", messages=[pb.Message(data=b"after")])
                )
                assert await handled.get() == b"after"
