"""Two control planes: what a real client does when it loses one, the other, or both."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.mesh.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def publish(replicas: list[Traffic], *names: str) -> None:
    for replica in replicas:
        replica.servers.update(replicas[0].servers)
        replica.publish(*names)


@pytest.mark.skipif(not _has_ipv6(), reason="needs a second loopback address behind one name")
async def test_behind_one_name_the_loss_of_either_costs_no_call_and_no_news(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    first = await stack.enter_async_context(Traffic(tmp_path))
    second = await stack.enter_async_context(Traffic(tmp_path, "[::1]", first.port))
    replicas = [first, second]
    for name in ("one", "two", "three"):
        await first.server(name)
    publish(replicas, "one")
    client = await first.client()
    await client.until(lambda answers: answers.share("one") == 1)
    calls = asyncio.create_task(client.calls(3000, at_once=2))
    used, other = (first, second) if first.hub.clients else (second, first)
    await used.stop_control()
    publish([other], "one", "two")
    await client.until(lambda answers: set(answers.seen) == {"one", "two"})
    await used.start_control()
    await other.stop_control()
    publish([used], "three")
    await client.until(lambda answers: set(answers.seen) == {"three"})
    assert (await calls).failed() == 0


async def test_the_loss_of_all_costs_no_call_and_news_come_when_one_is_back(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    control = await stack.enter_async_context(Traffic(tmp_path))
    for name in ("one", "two"):
        await control.server(name)
    control.publish("one")
    client = await control.client()
    await client.until(lambda answers: answers.share("one") == 1)
    await control.stop_control()
    assert (await client.calls(500)).seen == {"one": 500}
    control.publish("one", "two")
    await control.start_control()
    await client.until(lambda answers: set(answers.seen) == {"one", "two"})


async def test_of_a_list_the_second_is_asked_for_what_the_first_never_told(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    first = await stack.enter_async_context(Traffic(tmp_path))
    second = await stack.enter_async_context(Traffic(tmp_path))
    replicas = [first, second]
    await first.server("one")
    await first.server("other", "storage")
    publish(replicas)
    both = [f"localhost:{replica.port}" for replica in replicas]
    client = await first.client(controls=both)
    await client.until(lambda answers: answers.share("one") == 1)
    await first.stop_control()
    assert (await client.calls(100)).seen == {"one": 100}
    await client.until(lambda answers: answers.share("other") == 1, service="storage")
    assert second.hub.clients
