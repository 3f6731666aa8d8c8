"""Streams that an operator deleted in RabbitMQ: asked for before anything is lost for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.queueing.backends.rabbit.topology import log_name, retained_name
from services.queueing.kept import Events, Position
from services.queueing.resources import Topic
from services.runtime.errors import FailedPreconditionError, NotFoundError, PlexusError
from tests.contracts.broker_steps import arriving, publish, settled, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import httpx

    from services.queueing.backends.rabbit import RabbitBroker
    from tests.servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def operator(rabbitmq: RabbitServer) -> Iterator[httpx.Client]:
    """RabbitMQ's own management."""
    with rabbitmq.http() as http:
        yield http


@pytest.fixture
async def broker(rabbitmq: RabbitServer, rabbitmq_vhost: str, tmp_path: Path) -> AsyncIterator[RabbitBroker]:
    async with rabbit_broker(rabbitmq.url(rabbitmq_vhost), tmp_path / "state.sqlite") as broker:
        await broker.create_topic(Topic("jobs"))
        yield broker


def delete(operator: httpx.Client, vhost: str, stream: str) -> None:
    operator.delete(f"/queues/{vhost}/{stream}").raise_for_status()


async def refused(broker: RabbitBroker, position: Position, kind: type[PlexusError], reason: str) -> None:
    """Seek is refused, twice, and what the subscription holds stays."""
    for _ in range(2):
        with pytest.raises(kind) as raised:
            await broker.seek("work", position)
        assert raised.value.reason == reason
    assert await settled(broker, ready=2)
    assert sorted(await arriving(broker, count=2)) == ["a", "b"]


async def test_seek_to_a_snapshot_whose_stream_is_gone_leaves_the_subscription_as_it_is(
    broker: RabbitBroker, operator: httpx.Client, rabbitmq_vhost: str
) -> None:
    await subscribe(broker)
    await broker.create_snapshot("kept", "work", {})
    await publish(broker, "a", "b")
    (stream,) = [
        queue["name"]
        for queue in operator.get(f"/queues/{rabbitmq_vhost}").raise_for_status().json()
        if queue["name"].startswith("plexus.snapshot.")
    ]
    delete(operator, rabbitmq_vhost, stream)
    await refused(broker, Position(snapshot="kept"), NotFoundError, "SNAPSHOT_NOT_FOUND")


async def test_seek_to_a_time_whose_stream_is_gone_leaves_the_subscription_as_it_is(
    broker: RabbitBroker, operator: httpx.Client, rabbitmq_vhost: str
) -> None:
    await subscribe(broker, retain_acked=True, ttl_s=3600)
    await publish(broker, "a", "b")
    delete(operator, rabbitmq_vhost, retained_name("work"))
    await refused(broker, Position(time=1.0), FailedPreconditionError, "RETAINED_GONE")


@pytest.mark.parametrize("position", [Position(time=1.0), Position(sequence=1)])
async def test_seek_in_a_log_whose_stream_is_gone_leaves_the_subscription_as_it_is(
    broker: RabbitBroker, operator: httpx.Client, rabbitmq_vhost: str, position: Position
) -> None:
    topic = await broker.get_topic("jobs")
    await broker.update_topic(Topic("jobs", created=topic.created, log=True))
    await subscribe(broker)
    await publish(broker, "a", "b")
    delete(operator, rabbitmq_vhost, log_name("jobs"))
    await refused(broker, position, FailedPreconditionError, "TOPIC_LOG_GONE")
    with pytest.raises(FailedPreconditionError):
        await broker.list_events("jobs", Events(), limit=10)
