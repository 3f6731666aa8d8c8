"""What the service's user in RabbitMQ may do: enough, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import aiormq.exceptions
import httpx
import pytest

from services.queueing.backends.rabbit.topology import PERMISSION, definitions
from services.queueing.domain import Message
from services.queueing.resources import Topic
from tests.contracts.broker_steps import arriving, subscribe
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aio_pika.abc import AbstractChannel

    from tests.servers.rabbitmq import RabbitServer

    Attempt = Callable[[AbstractChannel], Awaitable[object]]

pytestmark = pytest.mark.timeout(400)  # the first test starts the server
WITHIN_S = 60.0


@pytest.fixture
def url(rabbitmq: RabbitServer, rabbitmq_vhost: str) -> Iterator[str]:
    """Of a user with the rights that the definitions give."""
    with rabbitmq.http() as http:
        http.put(f"/users/{rabbitmq_vhost}", json={"password": "secret", "tags": ""}).raise_for_status()
        rights = dict.fromkeys(("configure", "write", "read"), PERMISSION)
        http.put(f"/permissions/{rabbitmq_vhost}/{rabbitmq_vhost}", json=rights).raise_for_status()
        yield str(
            httpx.URL(rabbitmq.url(rabbitmq_vhost)).copy_with(username=rabbitmq_vhost, password="secret")
        )
        http.delete(f"/users/{rabbitmq_vhost}")


@pytest.fixture
async def others(rabbitmq: RabbitServer, rabbitmq_vhost: str) -> AsyncIterator[None]:
    """A queue of another application in the same virtual host, with a message, and an exchange."""
    async with await aio_pika.connect(rabbitmq.url(rabbitmq_vhost)) as connection:
        channel = await connection.channel()
        await channel.declare_queue("payroll", durable=True)
        await channel.declare_exchange("payments", durable=True)
        await channel.default_exchange.publish(aio_pika.Message(b"secret"), "payroll")
        yield


def test_the_definitions_are_what_the_code_declares() -> None:
    file = Path(__file__).resolve().parents[2] / "rabbitmq" / "definitions.json"
    assert json.loads(file.read_text()) == definitions("plexus", "plexus")


async def test_the_service_needs_no_more_rights_than_the_definitions_give(url: str, tmp_path: Path) -> None:
    async with rabbit_broker(url, tmp_path / "state.sqlite") as broker:
        await broker.create_topic(Topic("jobs", log=True))
        await subscribe(broker)
        await broker.publish("jobs", [Message(b"a"), Message(b"b", delay_s=0.01)])
        assert sorted(await arriving(broker, count=2)) == ["a", "b"]
        await broker.delete_subscription("work")
        await broker.delete_topic("jobs")


async def _publish_to(channel: AbstractChannel, exchange: str, key: str) -> None:
    target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
    await target.publish(aio_pika.Message(b"forged"), key)


async def _read(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).get(fail=False)


async def _empty(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).purge()


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    "attempt",
    [
        lambda channel: channel.declare_queue("mine", durable=True),
        lambda channel: channel.declare_queue("payroll", durable=True),
        lambda channel: channel.declare_exchange("mine"),
        lambda channel: channel.queue_delete("payroll"),
        lambda channel: channel.exchange_delete("payments"),
        lambda channel: _read(channel, "payroll"),
        lambda channel: _empty(channel, "payroll"),
        lambda channel: _publish_to(channel, "", "payroll"),
        lambda channel: _publish_to(channel, "payments", ""),
    ],
    ids=[
        *("make a queue", "make another's", "make an exchange", "delete a queue", "delete an exchange"),
        *("read", "purge", "publish to a queue", "publish to an exchange"),
    ],
)
async def test_the_services_user_may_do_nothing_with_what_is_not_its_own(url: str, attempt: Attempt) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await asyncio.wait_for(attempt(channel), WITHIN_S)
        channel = await connection.channel()
        await channel.declare_queue("plexus.own", exclusive=True)  # so it was the name that was refused


async def test_the_services_user_sees_no_other_virtual_host_and_no_management(
    url: str, rabbitmq: RabbitServer
) -> None:
    user = httpx.URL(url)
    with rabbitmq.vhost() as foreign, pytest.raises(aiormq.exceptions.AMQPError):
        await asyncio.wait_for(aio_pika.connect(str(user.copy_with(path=f"/{foreign}"))), WITHIN_S)
    with rabbitmq.http() as http:
        answer = http.get("/overview", auth=(user.username, "secret"))
    assert answer.status_code == httpx.codes.UNAUTHORIZED
