"""What is done to a small mesh under load, and what its callers saw of it."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._processes import ANSWER_S
from benchmarks._rolling_world import NAME, World, failed, total

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks._rolling_world import Seen
    from tests.servers.consul import ConsulAgent

BREAKER = 20
"""Calls at once that the circuit breaker is set to."""
THREE = {"1", "2", "3"}
AFTER_S = 10.0
"""The load goes on after an outage, for what its end may do."""
SETTLE_S = 0.5
"""Between two changes of a rule: a watch that is woken more often than a few times a second is paced."""
_OUTLIVES_S = "60"
"""A registration that is not what takes a stopped instance away within the benchmark."""


async def rolling(world: World, rate: float, rounds: int) -> Seen:
    """Restart the instances one after the other, with no retry to hide a failed call."""
    world.policy("retry: {attempts: 1}")
    await world.ask("start", rate=rate)
    for _ in range(rounds):
        for number in (1, 2, 3):
            await world.end_server(number)
            await world.start_server(number)
    seen = await world.load_ends()
    world.policy("retry: {attempts: 3}")
    return seen


async def killed(world: World, rate: float, kills: int) -> Seen:
    """Kill -9 one of three, several times."""
    await world.ask("start", rate=rate)
    for _ in range(kills):
        await asyncio.sleep(2)
        await world.end_server(3, signal.SIGKILL)
        await asyncio.sleep(2)
        await world.start_server(3)
    return await world.load_ends()


class Stopped(NamedTuple):
    """How latency went while one of three instances did not answer.

    Attributes:
        back_s: Seconds until p99 was as before.
        normal_s: p99 before.
        seconds: p99 of each second after.
    """

    back_s: float
    normal_s: float
    seconds: list[float]


async def stopped(world: World, rate: float, stop_s: int) -> Stopped:
    """SIGSTOP one of three, whose registration would last longer: outlier detection is what ejects it."""
    await world.end_server(3)
    victim = await world.start_server(3, PLEXUS_MESH__LEASE_S=_OUTLIVES_S)
    await world.until_all(THREE)
    await world.ask("start", rate=rate, timeout_s=1.0)
    await asyncio.sleep(5)
    began = time.monotonic()
    victim.send(signal.SIGSTOP)
    await asyncio.sleep(stop_s)
    latency = (await world.ask("stop"))["latency"]
    victim.send(signal.SIGCONT)
    await world.end_server(3)
    await world.start_server(3)

    def p99(low: float, high: float) -> float:
        part = sorted(took for started, took in latency if low <= started < high)
        return part[int(0.99 * (len(part) - 1))] if part else 0.0

    normal = p99(began - 4, began)
    seconds = [p99(began + second, began + second + 1) for second in range(stop_s)]
    bound = max(2 * normal, 0.1)
    slow = [second for second, value in enumerate(seconds) if value > bound]
    return Stopped(max(slow) + 1 if slow else 0.0, normal, seconds)


async def dead_backend(world: World, rate: float, seconds: float) -> float:
    """Attempts for each call while every call fails."""
    before = world.unavailable()
    await world.ask("start", rate=rate, headers={"x-fail": "1"})
    await asyncio.sleep(seconds)
    seen = await world.load_ends()
    return (world.unavailable() - before) / total(seen)


async def breaker(world: World) -> tuple[int, int]:
    """Calls let through and calls shed of three times as many as the breaker allows."""
    world.policy(f"circuit_breaker: {{max_requests: {BREAKER}}}\nretry: {{attempts: 1}}")
    deadline = time.monotonic() + ANSWER_S
    while True:
        calls = 3 * BREAKER
        seen = (await world.ask("burst", count=calls, at_once=calls, headers={"x-wait": "1"}))["seen"]
        if failed(seen) or time.monotonic() > deadline:
            return total(seen) - failed(seen), failed(seen)


async def canary(world: World, calls: int) -> float:
    """Percentage points between a canary's share and the wanted one."""
    await world.start_server(5, PLEXUS_MESH__VERSION="9.0")
    world.policy("subsets: {stable: {version: '0.*', weight: 90}, canary: {version: '9.*', weight: 10}}")
    deadline = time.monotonic() + ANSWER_S
    while True:
        seen = (await world.ask("burst", count=200, at_once=4))["seen"]
        if (set(seen) == {*THREE, "5"} and seen["5"] < 45) or time.monotonic() > deadline:
            break
    seen = (await world.ask("burst", count=calls, at_once=16))["seen"]
    world.policy("retry: {attempts: 3}")
    await world.end_server(5)
    await world.until_all(THREE)
    share: float = 100 * seen.get("5", 0) / total(seen)
    return abs(share - 10)


async def rotation(folder: Path, rate: float, seconds: float, every_s: float) -> Seen:
    """Certificates that are renewed every few seconds, and connections that are made anew."""
    async with World(folder, ttl_s=every_s * 1.5) as world:
        await world.ask("start", rate=rate)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # A connection outlives its certificate: only a new one shows that the new one holds.
            await world.end_server(1)
            await world.start_server(1)
            await asyncio.sleep(every_s)
        return await world.load_ends()


class Outage(NamedTuple):
    """How an outage went.

    Attributes:
        seen: What calls got.
        waited_for: What an instance that was started meanwhile said that it waits for.
        joined_s: Seconds from the end of the outage until it served.
    """

    seen: Seen
    waited_for: str
    joined_s: float


async def outage(world: World, rate: float, seconds: float, consul: ConsulAgent | None = None) -> Outage:
    """The control plane is away, and Consul with it."""
    await world.ask("start", rate=rate)
    await world.kill_control()
    if consul is not None:
        consul.kill()
    newcomer = await world.start_server(6, wait=False)
    await asyncio.sleep(seconds)
    reasons = [entry.get("dependency", "control") for entry in world.said(6, "waiting_for")]
    reasons += [entry["reason"] for entry in world.said(6, "registry_unavailable")]
    back = time.monotonic()
    if consul is not None:
        await asyncio.to_thread(consul.start)
    await world.start_control()
    await newcomer.read()
    joined_s = time.monotonic() - back
    await asyncio.sleep(min(AFTER_S, seconds))
    seen = await world.load_ends()
    await world.until_all({*THREE, "6"})
    await world.end_server(6)
    return Outage(seen, ", ".join(reasons) or "nothing said", joined_s)


async def intention(world: World, consul: ConsulAgent, times: int) -> tuple[float, float]:
    """Seconds from a rule's change in Consul until every instance obeys the new one: median and worst."""
    took: list[float] = []
    with consul.http() as http:
        shipped = http.get(f"/config/service-intentions/{NAME}").raise_for_status().json()
        denied = {**shipped, "Sources": [{"Name": "cli", "Action": "deny"}]}
        for _ in range(times):
            for entry, code in ((denied, "PERMISSION_DENIED"), (shipped, "OK")):
                began = time.monotonic()
                http.put("/config", json=entry).raise_for_status()
                took.append(await world.ask("until", code=code) - began)
                await asyncio.sleep(SETTLE_S)
    return statistics.median(took), max(took)
