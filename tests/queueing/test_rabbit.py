"""The broker on a real RabbitMQ: its contract, and what happens when the server dies or falls silent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.queueing.backends.rabbit import RabbitBroker
from services.queueing.domain import Events, Message
from services.queueing.resources import Topic
from services.runtime.errors import UnimplementedError
from tests.contracts.broker import BrokerContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.queueing.domain import Broker
    from tests.servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.timeout(400)  # the first test starts the server


@pytest.fixture
def url(rabbitmq: RabbitServer, rabbitmq_vhost: str) -> str:
    return rabbitmq.url(rabbitmq_vhost)


class TestRabbitBroker(BrokerContract):
    @pytest.fixture
    async def broker(self, url: str, tmp_path: Path) -> AsyncIterator[RabbitBroker]:
        async with RabbitBroker(url, tmp_path / "state.sqlite") as broker:
            await broker.create_topic(Topic("jobs"))
            yield broker

    async def test_a_topics_settings_are_kept_and_change(self, broker: Broker) -> None:
        topic = await broker.create_topic(Topic("kept", log=True, retention_s=60, labels={"a": "b"}))
        assert await broker.get_topic("kept") == topic
        changed = await broker.update_topic(replace(topic, labels={"c": "d"}))
        assert await broker.get_topic("kept") == changed
        with pytest.raises(UnimplementedError):  # a stream's arguments are fixed
            await broker.update_topic(replace(topic, retention_s=120))

    async def test_a_log_forgets_what_is_too_old_or_too_much(self, broker: Broker) -> None:
        """A stream forgets by whole segments, the last of which it keeps."""
        topic = Topic("audit", log=True, retention_bytes=400_000)
        await broker.create_topic(topic)
        for _ in range(30):
            await broker.publish("audit", [Message(b"x" * 100_000)])
        assert len(await broker.list_events("audit", Events(), limit=100)) < 20
