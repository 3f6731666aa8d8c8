"""Topics that are there from the start, on both brokers and both databases of the state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from services.queueing.default_topics import NAMES, make_default_topics
from services.queueing.domain import Message
from services.queueing.kept import Events
from services.queueing.resources import Topic

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.queueing.state import Database

pytestmark = pytest.mark.timeout(400)  # the first test on RabbitMQ starts it
DAY_S = 24 * 3600.0


async def test_they_are_made_once_and_what_a_user_did_to_them_stays(
    make_broker: Callable[[], Any], state: Database
) -> None:
    async with make_broker() as broker:
        mine = await broker.create_topic(Topic("audit-events", labels={"whose": "mine"}))
        await make_default_topics(broker, state, retention_s=DAY_S)
        topics = {topic.name: topic for topic in await broker.list_topics(limit=10)}
        assert set(topics) == set(NAMES)
        assert topics["audit-events"] == mine
        assert (topics["error-events"].log, topics["error-events"].retention_s) == (True, DAY_S)
        await broker.publish("workflow-events", [Message(b"a")])
        assert len(await broker.list_events("workflow-events", Events(), limit=10)) == 1

        await broker.delete_topic("audit-events")
        await broker.update_topic(replace(topics["error-events"], log=False))
        await make_default_topics(broker, state, retention_s=2 * DAY_S)
        topics = {topic.name: topic for topic in await broker.list_topics(limit=10)}
        assert set(topics) == {"workflow-events", "error-events"}
        assert (topics["error-events"].log, topics["workflow-events"].retention_s) == (False, DAY_S)
