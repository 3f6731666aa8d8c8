"""Metrics of messages, on either backend; the handbook's table of them."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Metric

from services.queueing.domain import Delivery, Levels, Message, Refusal
from services.queueing.levels import LevelsCollector
from services.queueing.main import SERVICE
from services.queueing.metered import metered
from services.queueing.metrics import ALL_REPLIES, MOST_NAMES, OTHERS, ByName
from services.queueing.resources import RetryPolicy, Subscription, Topic
from services.runtime.errors import NotFoundError, UnavailableError
from tests.contracts.broker_steps import AT_ONCE, publish, pull, subscribe
from tests.docs.pages import HANDBOOK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.queueing.domain import Broker

pytestmark = pytest.mark.timeout(400)  # the first test may start the server
PAGE = HANDBOOK / "queueing-operations.md"
KINDS = {"counter", "gauge", "histogram"}


@pytest.fixture
async def broker(make_broker: Callable[[], Any]) -> AsyncIterator[Broker]:
    async with make_broker() as opened:
        broker = metered(opened)
        await broker.create_topic(Topic("jobs"))
        yield broker


def counted(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"plexus_queue_{metric}", labels) or 0.0


async def levels(broker: Any, **settings: Any) -> dict[tuple[str, str], float]:
    """What Prometheus would see: values by metric and subscription."""
    registry = CollectorRegistry()
    registry.register(LevelsCollector(broker, **settings))
    families = await asyncio.to_thread(lambda: list(registry.collect()))
    return {
        (sample.name.removeprefix("plexus_queue_"), sample.labels.get("subscription", "")): sample.value
        for family in families
        for sample in family.samples
    }


async def leased(broker: Broker, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await pull(broker, count=count - len(found), wait_s=10)
    return found


async def test_what_consumers_do_is_counted(broker: Broker) -> None:
    def numbers() -> dict[str, float]:
        names = ("delivered", "redelivered", "acknowledged", "refused", "late", "given_up")
        return {name: counted(f"{name}_total", subscription="work") for name in names}

    await subscribe(broker)
    before, published = numbers(), counted("published_total", topic="jobs")
    confirmed = counted("publish_seconds_count")
    await publish(broker, "a", "b", "c")
    assert counted("published_total", topic="jobs") - published == 3
    assert counted("publish_seconds_count") - confirmed == 1
    first, second, third = await leased(broker, 3)
    assert await broker.acknowledge("work", [first.ack_id]) == []
    assert await broker.acknowledge("work", [first.ack_id]) == [first.ack_id]
    await broker.nack("work", [Refusal(second.ack_id), Refusal(third.ack_id, dead=True)])
    (again,) = await leased(broker, 1)
    await broker.extend("work", [(again.ack_id, 60.0)])
    await broker.acknowledge("work", [again.ack_id])
    since = {name: value - before[name] for name, value in numbers().items()}
    assert since == {
        "delivered": 4,
        "redelivered": 1,
        "acknowledged": 2,
        "refused": 2,
        "late": 1,
        "given_up": 1,
    }


async def test_a_lease_that_ends_in_silence_is_counted(broker: Broker) -> None:
    await subscribe(broker, ack_deadline_s=1.0)
    await publish(broker, "a")
    before = counted("leases_expired_total", subscription="work")
    await leased(broker, 1)
    (again,) = await leased(broker, 1)
    assert again.attempt == 2
    assert counted("leases_expired_total", subscription="work") - before == 1


async def test_a_refused_publish_is_counted_by_its_reason(broker: Broker) -> None:
    before = counted("publish_failures_total", reason="TOPIC_NOT_FOUND")
    with pytest.raises(NotFoundError):
        await broker.publish("nothing", [Message(b"")])
    assert counted("publish_failures_total", reason="TOPIC_NOT_FOUND") - before == 1
    assert counted("published_total", topic="nothing") == 0


async def test_what_subscriptions_hold_is_told_when_asked(broker: Broker) -> None:
    await subscribe(broker, retry=RetryPolicy(AT_ONCE.backoff, 0, 0, max_attempts=1))
    await subscribe(broker, "idle")
    await publish(broker, "a", "b", "c")
    await publish(broker, "later", delay_s=600)
    first, _ = await leased(broker, 2)
    await broker.nack("work", [Refusal(first.ack_id, "no")])

    async def seen() -> dict[str, float]:
        found = await levels(broker)
        return {name: value for (name, subscription), value in found.items() if subscription in {"", "work"}}

    async with asyncio.timeout(60):
        while (found := await seen())["dead_letters"] != 1 or found["ready"] != 1 or found["delayed"] != 1:  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0.05)
    assert (found["up"], found["broker_blocked"], found["leased"]) == (1, 0, 1)
    assert 0 <= found["oldest_seconds"] < 3600
    idle = await levels(broker)
    assert idle["ready", "idle"] == 3
    assert idle["leased", "idle"] == 0


async def test_what_is_deleted_leaves_the_metrics(broker: Broker) -> None:
    await broker.create_topic(Topic("brief"))
    await broker.create_subscription(Subscription("short", "brief"))
    await broker.publish("brief", [Message(b"")])
    (delivery,) = await broker.pull("short", max_messages=1, max_bytes=1000, wait_s=30)
    await broker.acknowledge("short", [delivery.ack_id])
    assert counted("acknowledged_total", subscription="short") == 1
    assert counted("published_total", topic="brief") == 1
    await broker.delete_subscription("short")
    await broker.delete_topic("brief")
    assert not [name for name, subscription in await levels(broker) if subscription == "short"]
    labels = {"topic": "brief"}, {"subscription": "short"}
    assert REGISTRY.get_sample_value("plexus_queue_published_total", labels[0]) is None
    assert REGISTRY.get_sample_value("plexus_queue_acknowledged_total", labels[1]) is None


class Away:
    """A broker that does not answer."""

    async def levels(self, *, limit: int) -> Levels:  # noqa: ARG002 - the protocol's
        raise UnavailableError("RabbitMQ cannot be reached", reason="BROKER_UNAVAILABLE")


async def test_while_the_broker_is_away_nothing_old_is_told() -> None:
    assert await levels(Away()) == {("up", ""): 0.0}


async def test_names_beyond_the_bound_and_replies_share_a_series() -> None:
    counter = ByName("test_bounded_total", "Of this test.", "topic")
    for number in range(MOST_NAMES + 10):
        counter.add(f"t{number}")
    assert REGISTRY.get_sample_value("test_bounded_total", {"topic": OTHERS}) == 10
    counter.keep(["t7"])
    for number in range(3):
        counter.add(f"plexus-reply.{number}")
    counter.add("t7")
    assert REGISTRY.get_sample_value("test_bounded_total", {"topic": ALL_REPLIES}) == 3
    assert REGISTRY.get_sample_value("test_bounded_total", {"topic": "t7"}) == 2
    assert REGISTRY.get_sample_value("test_bounded_total", {"topic": "t8"}) is None


def registered() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels of each metric of the queueing service, by name."""
    found = {}
    assert SERVICE.name == "queueing"  # imported with all that it registers
    for collector in [*REGISTRY._collector_to_names]:
        names: tuple[str, ...] = tuple(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            found[_name(family)] = (family.type, names)
    return {name: value for name, value in found.items() if re.match(r"plexus_(queue|saga|schedule)", name)}


def _name(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


async def test_the_handbook_lists_every_metric_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(plexus_\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    listed = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows if kind in KINDS
    }
    gauges = LevelsCollector(Away())  # type: ignore[arg-type]
    known = registered() | {
        family.name: (family.type, tuple(family._labelnames)) for family in gauges.describe()
    }
    assert listed == known
    named = {
        name.removesuffix("_bucket").removesuffix("_count")
        for page in HANDBOOK.glob("*.md")
        for name in re.findall(r"plexus_(?:queue|schedule|saga)\w+", page.read_text())
    }
    assert named <= set(known)
