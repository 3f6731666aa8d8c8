"""RabbitMQ dying, falling silent, running out of room or losing its queues, under a broker that goes on."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aio_pika
import httpx
import pytest

import plexus.client
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.rabbit.topology import TOPICS, queue_name, routing_key
from services.queueing.backends.rabbit.wire import encode, fresh
from services.queueing.calls import Calls
from services.queueing.domain import Message, Refusal
from services.queueing.kept import Where
from services.queueing.resources import Backoff, Priority, RetryPolicy, Subscription, Topic
from services.queueing.servicer import QueueingServicer
from services.runtime.errors import ResourceExhaustedError, UnavailableError
from tests.contracts.broker_steps import AT_ONCE, bodies, publish, pull, subscribe
from tests.queueing.rabbit import rabbit_broker
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from services.queueing.backends.rabbit import RabbitBroker
    from services.queueing.domain import Delivery
    from tests.conftest import Serve

# One server for the module, since these tests harm it.
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("rabbitmq-faults")]
RECOVERY_S = 120.0


@pytest.fixture(scope="module")
def server(rabbitmq_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    with RabbitServer(rabbitmq_program, tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def vhost(server: RabbitServer) -> Iterator[str]:
    with server.vhost() as vhost:
        yield vhost


@pytest.fixture
async def broker(server: RabbitServer, vhost: str, tmp_path: Path) -> AsyncIterator[RabbitBroker]:
    async with rabbit_broker(
        server.url(vhost), tmp_path / "state.sqlite", heartbeat_s=2, publish_deadline_s=3
    ) as broker:
        await broker.create_topic(Topic("jobs"))
        yield broker


async def everything(broker: RabbitBroker, count: int) -> list[Delivery]:
    """So many different messages, acknowledged."""
    found: dict[str, Delivery] = {}
    async with asyncio.timeout(RECOVERY_S):
        while len(found) < count:
            try:
                deliveries = await pull(broker, count=1000, wait_s=5)
            except UnavailableError:
                continue
            lost = set(await broker.acknowledge("work", [delivery.ack_id for delivery in deliveries]))
            found |= {d.message.message_id: d for d in deliveries if d.ack_id not in lost}
    return list(found.values())


async def test_what_was_confirmed_survives_the_servers_death_and_consumers_go_on(
    server: RabbitServer, broker: RabbitBroker
) -> None:
    await subscribe(broker)
    confirmed = await publish(broker, *map(str, range(100)))
    held = await pull(broker, count=10)
    confirmed += await publish(broker, "later", delay_s=0.5)
    await asyncio.to_thread(server.settle)
    server.kill()
    with pytest.raises(UnavailableError):
        await publish(broker, "refused")
    assert await broker.acknowledge("work", [delivery.ack_id for delivery in held]) == [
        delivery.ack_id for delivery in held
    ]
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                confirmed += await publish(broker, "after")
                break
            except UnavailableError:
                continue
    found = await everything(broker, len(confirmed))
    assert {delivery.message.message_id for delivery in found} >= set(confirmed)


async def test_the_sdks_publisher_and_subscriber_outlive_the_servers_death(
    server: RabbitServer, broker: RabbitBroker, serve: Serve
) -> None:
    await subscribe(broker)
    await asyncio.to_thread(server.settle)
    seen: set[bytes] = set()
    some, enough = asyncio.Event(), asyncio.Event()
    total = 300

    async def handle(delivery: pb.Delivery) -> None:
        seen.add(delivery.data)
        if len(seen) >= total / 3:
            some.set()
        if len(seen) == total:
            enough.set()

    async with (
        Calls(broker) as calls,
        serve(
            lambda server: queueing_pb2_grpc.add_QueueingServiceServicer_to_server(
                QueueingServicer(broker, calls), server
            )
        ) as channel,
        asyncio.timeout(2 * RECOVERY_S),
    ):
        stub = queueing_pb2_grpc.QueueingServiceStub(channel)
        subscriber = plexus.client.Subscriber(stub, "work", handle, on_error=lambda _: None)
        publisher = plexus.client.Publisher(stub, "jobs", deadline_s=RECOVERY_S, max_messages=20)
        async with subscriber, publisher:

            async def send() -> None:
                for number in range(total):
                    await publisher.send(b"%d" % number)
                await publisher.flush()

            sending = asyncio.create_task(send())
            await some.wait()
            server.kill()
            await asyncio.to_thread(server.start)
            await sending
            await enough.wait()
    assert seen == {b"%d" % number for number in range(total)}


async def test_a_server_that_falls_silent_is_noticed_and_nothing_is_lost(
    server: RabbitServer, broker: RabbitBroker
) -> None:
    await subscribe(broker)
    confirmed = await publish(broker, "a")
    server.pause()
    try:
        with pytest.raises((UnavailableError, ResourceExhaustedError)):
            await publish(broker, "unknown")
    finally:
        server.resume()
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                confirmed += await publish(broker, "b")
                break
            except (UnavailableError, ResourceExhaustedError):
                continue
    found = await everything(broker, len(confirmed))
    assert {delivery.data for delivery in found} >= {b"a", b"b"}


@pytest.mark.parametrize(("resource", "told"), [("disk", "low on disk"), ("memory", "low on memory")])
async def test_an_alarm_is_told_with_the_brokers_reason_and_consumers_go_on(
    server: RabbitServer, broker: RabbitBroker, resource: str, told: str
) -> None:
    await subscribe(broker)
    await publish(broker, "a", "b")
    assert bodies(await pull(broker, count=1)) == ["a"]
    alarm = f"{{resource_limit, {resource}, node()}}"
    await asyncio.to_thread(server.control, "eval", f"rabbit_alarm:set_alarm({{{alarm}, []}}).")
    try:
        with pytest.raises(ResourceExhaustedError) as caught:
            await publish(broker, "refused")
        assert (caught.value.reason, caught.value.metadata) == ("BROKER_BLOCKED", {"broker_reason": told})
        assert (await broker.levels(limit=9)).blocked == told
        assert bodies(await pull(broker, wait_s=30)) == ["b"]
    finally:
        await asyncio.to_thread(server.control, "eval", f"rabbit_alarm:clear_alarm({alarm}).")
    assert await publish(broker, "c")
    assert broker._publishing.blocked == ""


async def test_an_unconfirmed_publish_is_kept_over_a_reconnect(
    server: RabbitServer, vhost: str, tmp_path: Path
) -> None:
    async with rabbit_broker(
        server.url(vhost), tmp_path / "state.sqlite", publish_deadline_s=RECOVERY_S
    ) as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker)
        await publish(broker, "before")
        await asyncio.to_thread(server.settle)
        server.kill()
        waiting = asyncio.create_task(publish(broker, "meanwhile"))
        done, _ = await asyncio.wait([waiting], timeout=1)
        assert not done
        await asyncio.to_thread(server.start)
        (message_id,) = await asyncio.wait_for(waiting, RECOVERY_S)
        found = await everything(broker, 2)
        assert message_id in {delivery.message.message_id for delivery in found}


async def test_a_batch_that_was_cut_off_is_completed_by_its_repetition(
    server: RabbitServer, broker: RabbitBroker
) -> None:
    await subscribe(broker)
    await publish(broker, "before")
    await asyncio.to_thread(server.settle)
    batch = [Message(b"%d" % number + bytes(2000), dedup_id=str(number)) for number in range(1000)]
    cut_off = asyncio.create_task(broker.publish("jobs", batch))
    async with asyncio.timeout(RECOVERY_S):
        while not cut_off.done() and (await broker.stats("work")).ready < 2:  # noqa: ASYNC110 - polls a server
            await asyncio.sleep(0)
    server.kill()
    await asyncio.wait([cut_off], timeout=RECOVERY_S)
    assert isinstance(cut_off.exception(), UnavailableError | type(None))
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                ids = await broker.publish("jobs", batch)
                break
            except UnavailableError:
                continue
    found = await everything(broker, 1001)
    assert {delivery.message.message_id for delivery in found} > set(ids)
    assert len({delivery.data for delivery in found}) == len(set(ids)) + 1 == 1001
    stats = await broker.stats("work")
    assert (stats.ready, stats.leased, stats.dead) == (0, 0, 0)


async def test_a_consumer_is_there_again_after_the_server_closes_its_connections(
    server: RabbitServer, broker: RabbitBroker
) -> None:
    await subscribe(broker)
    await publish(broker, "a")
    await pull(broker)
    await asyncio.to_thread(server.control, "close_all_connections", "as an operator does")
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                await publish(broker, "b")
                break
            except UnavailableError:
                continue
    found = await everything(broker, 2)
    assert {delivery.data for delivery in found} == {b"a", b"b"}


async def test_queues_deleted_behind_our_back_are_made_again_and_consumed(
    server: RabbitServer, broker: RabbitBroker, vhost: str
) -> None:
    await subscribe(broker)
    await pull(broker)
    with server.http() as http:
        for level in Priority:
            http.delete(f"/queues/{vhost}/{queue_name('work', level)}").raise_for_status()
    await publish(broker, "a")
    assert bodies(await pull(broker, wait_s=60)) == ["a"]


async def test_a_dead_letter_whose_acknowledgement_is_lost_is_dead_once(broker: RabbitBroker) -> None:
    await subscribe(broker)
    await publish(broker, "poison", "good")
    poison, _ = await pull(broker)
    window = broker._consuming._windows["work"]
    wanted = poison.message.message_id
    (carried,) = [each for each in window.messages() if each.stored.message_id == wanted]
    # As when the process dies between the two: the dead letter is written, the acknowledgement is not sent.
    await broker._state.bury("work", carried, "bad")
    await broker._consuming.drop("work")
    assert bodies(await pull(broker, wait_s=30)) == ["good"]
    assert len(await broker.list_dead_letters("work", Where(), limit=10)) == 1


@pytest.mark.parametrize("settled", ["acknowledged", "dead", "deferred"])
async def test_what_rabbitmq_has_twice_is_handed_out_once(broker: RabbitBroker, settled: str) -> None:
    """As when a publish is repeated, since its confirmation was lost, by a service that died meanwhile."""
    await subscribe(broker, retry=RetryPolicy(Backoff.FIXED, 3600, 3600))
    (message_id,) = await publish(broker, "a", dedup_id="d")
    (delivery,) = await pull(broker)
    if settled == "acknowledged":
        assert await broker.acknowledge("work", [delivery.ack_id]) == []
    else:
        await broker.nack("work", [Refusal(delivery.ack_id, dead=settled == "dead")])
    await broker._consuming.drop("work")
    double = fresh("jobs", Message(b"a", dedup_id="d"), message_id, time.time() - 1)
    repeated = [(routing_key("jobs", Priority.NORMAL), encode(double, repeated=True))]
    assert await broker._publisher.publish(TOPICS, repeated) == [True]
    await publish(broker, "b")
    assert bodies(await pull(broker, wait_s=60)) == ["b"]
    stats = await broker.stats("work")
    assert (stats.ready, stats.dead, stats.delayed) == (0, settled == "dead", settled == "deferred")


async def test_leases_of_a_broker_that_closes_are_free_at_once(
    server: RabbitServer, vhost: str, tmp_path: Path
) -> None:
    url = server.url(vhost)
    async with rabbit_broker(url, tmp_path / "state.sqlite") as first:
        await first.create_topic(Topic("jobs"))
        await first.create_subscription(Subscription("work", "jobs", retry=AT_ONCE))
        await publish(first, "a")
        (held,) = await pull(first)
        await publish(first, "later", delay_s=3600)
    async with rabbit_broker(url, tmp_path / "state.sqlite") as second:
        (again,) = await pull(second, wait_s=30)
        assert (again.data, again.attempt) == (b"a", 1)
        assert await second.nack("work", [Refusal(held.ack_id)]) == [held.ack_id]
        assert (await second.stats("work")).delayed == 1


async def test_a_message_of_a_stranger_does_not_stop_the_queue(
    server: RabbitServer, broker: RabbitBroker, vhost: str
) -> None:
    await subscribe(broker)
    name = queue_name("work", Priority.NORMAL)
    async with await aio_pika.connect(server.url(vhost)) as connection:
        channel = await connection.channel()
        for headers in ({}, {"plexus": "no JSON"}, {"plexus": '{"priority": 99, "history": 1}'}):
            stranger = aio_pika.Message(b"raw", headers=dict(headers))
            await channel.default_exchange.publish(stranger, name)
    await publish(broker, "ours")
    found: list[str] = []
    async with asyncio.timeout(RECOVERY_S):
        while len(found) < 4:
            found += bodies(await pull(broker, wait_s=5))
    assert sorted(found) == ["ours", "raw", "raw", "raw"]


async def test_wrong_credentials_are_told_as_an_unavailable_dependency(
    server: RabbitServer, vhost: str, tmp_path: Path
) -> None:
    url = httpx.URL(server.url(vhost)).copy_with(password="wrong")
    async with rabbit_broker(str(url), tmp_path / "state.sqlite", publish_deadline_s=1) as broker:
        with pytest.raises(UnavailableError) as caught:
            await broker.create_topic(Topic("jobs", log=True))
        assert caught.value.metadata == {"dependency": "rabbitmq"}
