"""What the publisher says of messages, with a real RabbitMQ."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from services.queueing.backends.rabbit.topology import DIRECT, queue_name
from services.queueing.backends.rabbit.wire import Packet, encode, fresh
from services.queueing.domain import Message
from services.queueing.resources import Priority, Subscription, Topic
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.queueing.backends.rabbit import RabbitBroker
    from tests.servers.rabbitmq import RabbitServer

THERE = queue_name("work", Priority.NORMAL)


@pytest.fixture
async def broker(rabbitmq: RabbitServer, rabbitmq_vhost: str, tmp_path: Path) -> AsyncIterator[RabbitBroker]:
    async with rabbit_broker(rabbitmq.url(rabbitmq_vhost), tmp_path / "state.sqlite") as opened:
        await opened.create_topic(Topic("jobs"))
        await opened.create_subscription(Subscription("work", "jobs"))
        yield opened


def _packet(message_id: str) -> Packet:
    return encode(fresh("jobs", Message(b"x" * 300_000), message_id, time.time()))


async def test_each_message_of_a_group_has_its_own_answer(broker: RabbitBroker) -> None:
    ways = [THERE, "nowhere", THERE, "nowhere", THERE]
    told = await broker._publisher.publish(
        DIRECT, [(way, _packet(f"m{number}")) for number, way in enumerate(ways)]
    )
    assert told == [True, False, True, False, True]


async def test_of_messages_with_one_id_none_is_sure_when_one_came_back(broker: RabbitBroker) -> None:
    """The broker returns a message, not its number: all of them are published again, and handed out once."""
    again, other = _packet("again"), _packet("other")
    told = await broker._publisher.publish(DIRECT, [("nowhere", again), (THERE, again), (THERE, other)])
    assert told == [False, False, True]


async def test_nothing_is_kept_of_what_has_been_confirmed(broker: RabbitBroker) -> None:
    await broker._publisher.publish(DIRECT, [(THERE, _packet("a")), ("nowhere", _packet("b"))])
    channel = await broker._publisher._ready()
    assert channel.message_id_delivery_tag == {}
    async with asyncio.timeout(60):
        while channel.confirmations:  # noqa: ASYNC110 - aiormq tells nobody; what came back is confirmed later
            await asyncio.sleep(0.01)
