"""What is known stays known while a real agent dies, stops in its tracks or forgets; and comes back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from services.mesh.consul import watch
from services.mesh.consul.client import ConsulClient
from services.mesh.consul.config import ConsulConfig
from services.mesh.consul.intentions import watch_intentions
from services.mesh.consul.kv import KeyValues
from services.mesh.registry.client import Registration
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.registry.domain import Health
from services.mesh.trust.consul import Roots, watch_roots
from tests.contracts.registry import LEASE_S, instance
from tests.servers.consul import ConsulAgent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from services.mesh.intentions import IntentionTable
    from services.mesh.registry.domain import Instance

WITHIN_S = 90.0
KEY = "plexus/policies/vectors"
WATCHES = 5
"""Names, the one service, keys, intentions, roots."""


@pytest.fixture
def own(consul_program: Path, tmp_path: Path) -> Iterator[ConsulAgent]:
    with ConsulAgent(consul_program, tmp_path) as started:
        yield started


@pytest.fixture
async def client(own: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ConsulClient]:
    monkeypatch.setattr(watch, "MARGIN_S", 1.0)  # a stopped agent is given up sooner
    async with ConsulClient(ConsulConfig(address=own.url, wait_s=2, request_timeout_s=2)) as opened:
        yield opened


class Followed:
    """Everything that is watched, as last told."""

    def __init__(self, client: ConsulClient) -> None:
        self.instances: list[Instance] | None = None
        self.keys: dict[str, bytes] | None = None
        self.rules: IntentionTable | None = None
        self.roots: Roots | None = None
        self.told = 0
        registry = ConsulRegistry(client)
        watches = {
            "instances": registry.watch(),
            "keys": KeyValues(client).watch("plexus/"),
            "rules": watch_intentions(client, "vectors"),
            "roots": watch_roots(client),
        }
        self._tasks = [asyncio.create_task(self._follow(name, each)) for name, each in watches.items()]

    async def _follow(self, name: str, watched: AsyncIterator[Any]) -> None:
        async for now in watched:
            setattr(self, name, now)
            self.told += 1

    async def until(self, wanted: Callable[[Followed], object]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not wanted(self):
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.02)

    def known(self) -> tuple[object, ...]:
        return self.instances, self.keys, self.rules, self.roots

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def allows(followed: Followed) -> bool:
    return followed.rules is not None and followed.rules.decide("knowledge", "vectors", "/x").allowed


async def intend(client: ConsulClient, action: str) -> None:
    rule = {"Sources": [{"Name": "knowledge", "Action": action}]}
    await client.api.config.set("service-intentions", "vectors", rule)


async def fill(client: ConsulClient) -> None:
    await ConsulRegistry(client).register(instance(), lease_s=600)
    await KeyValues(client).put(KEY, b"1")
    await intend(client, "allow")


@pytest.fixture
async def followed(client: ConsulClient) -> AsyncIterator[Followed]:
    await fill(client)
    everything = Followed(client)
    await everything.until(
        lambda now: now.instances == [instance()] and now.keys == {KEY: b"1"} and allows(now) and now.roots
    )
    yield everything
    await everything.close()


async def answers(client: ConsulClient) -> None:
    """Wait until the agent takes writes again."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                # Outside what is followed: a watch may well see it before it is gone again.
                await KeyValues(client).put("again", b"")
                await KeyValues(client).delete("again")
            except Exception:  # noqa: BLE001 - whatever it is, the agent is not back yet
                await asyncio.sleep(0.1)
            else:
                return


async def all_failed(logs: list[Any]) -> None:
    """Wait until every watch has said that it failed."""
    async with asyncio.timeout(WITHIN_S):
        while len({entry["path"] for entry in logs if entry["event"] == "consul_watch_failed"}) < WATCHES:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_killed_agent_takes_nothing_away_and_changes_are_seen_when_it_is_back(
    own: ConsulAgent, client: ConsulClient, followed: Followed
) -> None:
    before = followed.known()
    with capture_logs() as logs:
        own.kill()
        await all_failed(logs)
    assert followed.known() == before
    await asyncio.to_thread(own.start)
    await answers(client)
    assert followed.known()[1:] == before[1:]
    await KeyValues(client).put(KEY, b"2")
    await intend(client, "deny")
    await ConsulRegistry(client).register(instance(2), lease_s=600)
    await followed.until(lambda now: now.keys == {KEY: b"2"} and not allows(now))
    await followed.until(lambda now: {entry.id for entry in now.instances or ()} >= {"vectors-2"})


async def test_a_stopped_agent_takes_nothing_away_and_changes_are_seen_when_it_goes_on(
    own: ConsulAgent, client: ConsulClient, followed: Followed
) -> None:
    before = followed.known()
    own.pause()
    try:
        with capture_logs() as logs:
            await all_failed(logs)
        assert followed.known() == before
    finally:
        own.resume()
    await answers(client)
    await KeyValues(client).put(KEY, b"2")
    await intend(client, "deny")
    await ConsulRegistry(client).keep_alive("vectors-1", Health.DRAINING)
    await followed.until(
        lambda now: (
            now.keys == {KEY: b"2"}
            and not allows(now)
            and [entry.health for entry in now.instances or ()] == [Health.DRAINING]
        )
    )


async def test_an_agent_that_forgot_everything_is_followed_and_registered_with_again(
    own: ConsulAgent, client: ConsulClient, followed: Followed
) -> None:
    registration = Registration(ConsulRegistry(client), instance(3), lease_s=LEASE_S / 10)
    renewing = asyncio.create_task(registration.run())
    await followed.until(lambda now: [e.id for e in now.instances or ()] == ["vectors-1", "vectors-3"])
    old = followed.roots
    assert old is not None
    own.kill()
    own.wipe()
    await asyncio.to_thread(own.start)
    try:
        # Indexes began anew, below those that the watches had.
        await followed.until(lambda now: [entry.id for entry in now.instances or ()] == ["vectors-3"])
        await followed.until(lambda now: now.keys == {} and not allows(now))
        await followed.until(lambda now: now.roots and now.roots.trust_domain != old.trust_domain)
        await fill(client)
        await followed.until(lambda now: now.keys == {KEY: b"1"} and allows(now))
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
