"""Nothing lost: producers and consumers while broker, service, consumers and connections are broken.

Every message whose publish was confirmed must be consumed or lie in the dead letters, also on a second
subscription that nobody consumes until all is well again; and what was published twice within its
deduplication window must be there once. What is broken when, and what producers and consumers do, follow from
the seed. Redeliveries are counted apart: delivery is at least once.

The last line is one JSON object: confirmed, consumed, dead, lost, duplicates (consumed once more),
dedup_duplicates (stored more than once in spite of a deduplication id), faults, max_recovery_s (from the end
of a fault until a message published after it was consumed). The exit code is 1 if lost or dedup_duplicates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.broker.plan import kinds, plan
from benchmarks.broker.producers import Confirmed, Producer
from benchmarks.broker.stage import Stage
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from benchmarks.broker.plan import Fault

TOPIC, WORK, AUDIT = "ledger", "work", "audit"
PRODUCERS, CONSUMERS = 2, 3
MAX_FAULTS = 10_000
RECOVERY_S = 180.0
"""Longest wait for consuming to go on; the bar is 30, and this six times that for a busy machine."""
QUIET_S = 90.0
"""Without progress for this long the rest is taken for lost; longer than any retry or reconnection."""


@dataclass(slots=True)
class Consumed:
    """What consumers wrote down: how often by name, under which message ids, and when first."""

    count: Counter[str] = field(default_factory=Counter)
    ids: dict[str, set[str]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    failed: int = 0

    def read(self, stage: Stage) -> None:
        """Take in what is new."""
        for consumer in stage.consumers:
            for entry in consumer.news():
                self.ids.setdefault(entry["name"], set()).add(entry["id"])
                if entry["what"] == "consumed":
                    self.count[entry["name"]] += 1
                    self.first.setdefault(entry["name"], entry["at"])
                else:
                    self.failed += 1


class Trial:
    """One backend's run."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._seed = seed
        self._told = Confirmed()
        self._found = Consumed()
        self._recoveries: list[float] = []

    async def prepare(self) -> None:
        """Make topic and subscriptions."""
        stub = self._stage.stub
        await stub.CreateTopic(pb.CreateTopicRequest(topic=TOPIC))
        for name in (WORK, AUDIT):
            subscription = pb.Subscription(name=name, topic=TOPIC)
            subscription.ack_deadline.FromSeconds(10)
            subscription.retry.max_attempts = 5
            subscription.retry.minimum.FromMilliseconds(100)
            subscription.retry.maximum.FromMilliseconds(1000)
            await stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
        await self._stage.settle()

    async def run(self, faults: list[Fault], seconds: float) -> dict[str, float]:
        """Break things for so long, then count."""
        await self.prepare()
        await self._stage.employ(CONSUMERS, WORK)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(PRODUCERS):
                producer = Producer(self._stage.stub, TOPIC, number, self._seed, self._told)
                group.create_task(producer.run(stop))
            await self._recovery(time.time())  # all is well to begin with
            ends = time.monotonic() + seconds
            for fault in faults:
                if time.monotonic() + fault.pause_s >= ends:
                    break
                await asyncio.sleep(fault.pause_s)
                await self._stage.suffer(fault)
                recovery = await self._recovery(time.time())
                self._recoveries.append(recovery)
                print(f"{fault!s:<18}{fault.lasts_s:>6.1f} s, again after {recovery:>5.1f} s", flush=True)
            stop.set()
        dead = await self._drain()
        await self._stage.dismiss()
        return self._count(dead, await self._audit())

    async def _recovery(self, since: float) -> float:
        """Seconds from then until the consumption of something published after it."""
        async with asyncio.timeout(RECOVERY_S):
            while True:
                self._found.read(self._stage)
                after = [
                    self._found.first[name]
                    for name, begun in self._told.begun.items()
                    if begun >= since and name in self._found.first
                ]
                if after:
                    return min(after) - since
                await asyncio.sleep(0.1)

    async def _dead(self) -> Counter[str]:
        names: Counter[str] = Counter()
        token = ""
        while True:
            request = pb.ListDeadLettersRequest(subscription=WORK, page_size=1000, page_token=token)
            answer = await self._stage.stub.ListDeadLetters(request, timeout=60)
            names.update(letter.data.decode() for letter in answer.dead_letters)
            token = answer.next_page_token
            if not token:
                return names

    async def _drain(self) -> Counter[str]:
        """Wait until everything confirmed is consumed or dead, or nothing moves any more."""
        last, since = -1, time.monotonic()
        while True:
            self._found.read(self._stage)
            dead = await self._dead()
            missing = [n for n in self._told.ids if n not in self._found.count and n not in dead]
            if len(missing) != last:
                last, since = len(missing), time.monotonic()
            if not missing or time.monotonic() - since > QUIET_S:
                return dead
            await asyncio.sleep(0.5)

    async def _audit(self) -> Counter[str]:
        """Consume the second subscription, with a service that dies in the middle of it."""
        names: Counter[str] = Counter()
        killed = False
        stub = self._stage.stub
        while True:
            request = pb.PullRequest(subscription=AUDIT, max_messages=500)
            request.wait.FromSeconds(2)
            answer = await stub.Pull(request, timeout=90, wait_for_ready=True)
            if not answer.deliveries:
                stats = await stub.GetStats(pb.GetStatsRequest(subscription=AUDIT), timeout=60)
                if not stats.ready + stats.leased + stats.delayed:
                    return names
                continue
            by_id = {delivery.ack_id: delivery.data.decode() for delivery in answer.deliveries}
            done = await stub.Acknowledge(
                pb.AcknowledgeRequest(subscription=AUDIT, ack_ids=by_id), timeout=60, wait_for_ready=True
            )
            names.update(name for ack_id, name in by_id.items() if ack_id not in done.expired)
            if not killed and len(names) > len(self._told.ids) / 2:
                killed = True
                await asyncio.to_thread(self._stage.service.kill)
                await asyncio.to_thread(self._stage.service.start)

    def _count(self, dead: Counter[str], audited: Counter[str]) -> dict[str, float]:
        consumed, told = self._found.count, self._told.ids
        lost = [name for name in told if name not in consumed and name not in dead]
        lost += [name for name in told if name not in audited]
        two_ids = {name for name in told if len(told[name] | self._found.ids.get(name, set())) > 1}
        deduplicated = self._told.deduplicated
        stored_again = two_ids | {n for n, count in audited.items() if count > 1 and n in deduplicated}
        print(f"unknown outcome {self._told.unknown}, refused calls {dict(self._told.errors)}")
        print(f"failed attempts {self._found.failed}, dead more than once {dead.total() - len(dead)}")
        for what, names in (("lost", lost), ("stored again", sorted(stored_again))):
            if names:
                print(f"{what}: {', '.join(names[:20])}")
        return {
            "confirmed": len(told),
            "consumed": sum(name in consumed for name in told),
            "dead": sum(name in dead for name in told),
            "lost": len(lost),
            "duplicates": consumed.total() - len(consumed),
            "dedup_duplicates": len(stored_again),
            "faults": len(self._recoveries),
            "max_recovery_s": round(max(self._recoveries, default=0.0), 2),
        }


async def run(backend: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One backend."""
    broker, seed = backend == "rabbitmq", options.seed
    if options.rounds:
        count, seconds = options.rounds * len(kinds(broker=broker)), math.inf
        print(f"{backend}: {count} faults, seed {seed}", flush=True)
    else:
        count, seconds = MAX_FAULTS, options.seconds
        print(f"{backend}: {seconds:g} s, seed {seed}", flush=True)
    async with Stage(folder / backend, broker=broker) as stage:
        faults = plan(seed, count, broker=broker, consumers=CONSUMERS)
        figures = await Trial(stage, seed).run(faults, seconds)
    print(json.dumps({"backend": backend, **figures}), flush=True)
    return figures


def main() -> None:
    """Run, report, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600.0, help="of faults, for each backend")
    parser.add_argument("--rounds", type=int, default=0, help="instead: everything is broken so often")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["sqlite", "rabbitmq"])
    options = parser.parse_args()
    print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    folder = Path(tempfile.mkdtemp(prefix="plexus-ledger-"))
    try:
        found = [asyncio.run(run(backend, options, folder)) for backend in options.backends]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {key: sum(figures[key] for figures in found) for key in found[0]}
    figures["max_recovery_s"] = max(entry["max_recovery_s"] for entry in found)
    print(json.dumps(figures))
    sys.exit(1 if figures["lost"] or figures["dedup_duplicates"] else 0)


if __name__ == "__main__":
    main()
