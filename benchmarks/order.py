"""Order per key: many messages, few keys, consumers that refuse at random and are killed.

Each consumer is a process of its own that writes down what it is given, in the order in which it is given it,
and refuses some of it. Within a key the first delivery of a message must not come before that of an earlier
one, and none may be missing; what was refused or lost with a consumer may come again before the next does.

The last line is one JSON object: messages, keys, out_of_order, missing, deliveries, kills, per_s. The exit
code is 1 if out_of_order or missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.broker.stage import Stage
from plexus.queueing.v1 import queueing_pb2 as pb

TOPIC, WORK = "ordered", "work"
BATCH = 200
QUIET_S = 120.0
"""Without a delivery for this long the rest is taken for missing."""


class Order:
    """What consumers were given, by key."""

    def __init__(self, messages: int, keys: int) -> None:
        """Nothing was given yet."""
        self._expected = messages
        self._keys = keys
        self._given: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._done: set[str] = set()
        self.deliveries = 0

    def read(self, stage: Stage) -> int:
        """Take in what is new; how many messages are done."""
        for consumer in stage.consumers:
            for entry in consumer.news():
                key, _, number = entry["name"].partition(":")
                self._given[key].append((entry["at"], int(number)))
                self.deliveries += 1
                if entry["what"] == "consumed":
                    self._done.add(entry["name"])
        return len(self._done)

    def out_of_order(self) -> int:
        """Deliveries of a message before all earlier ones of its key had been delivered."""
        wrong = 0
        for given in self._given.values():
            newest = -1
            for _, number in sorted(given):
                wrong += number > newest + 1
                newest = max(newest, number)
        return wrong

    def missing(self) -> int:
        """Messages that were not consumed."""
        return self._expected - len(self._done)


async def _publish(stage: Stage, messages: int, keys: int) -> None:
    names = [f"{number % keys}:{number // keys}" for number in range(messages)]
    for start in range(0, messages, BATCH):
        batch = [
            pb.Message(data=name.encode(), ordering_key=name.partition(":")[0])
            for name in names[start : start + BATCH]
        ]
        await stage.stub.Publish(pb.PublishRequest(topic=TOPIC, messages=batch), timeout=60)


async def _kill(stage: Stage, dice: random.Random, pause_s: float) -> bool:
    """Kill a consumer that has begun, if there is one, and start it again."""
    await asyncio.sleep(pause_s * dice.uniform(0.5, 1.5))
    begun = [consumer for consumer in stage.consumers if consumer.works]
    if not begun:
        return False
    victim = dice.choice(begun)
    await asyncio.to_thread(victim.kill)
    await asyncio.to_thread(victim.start)
    return True


async def run(stage: Stage, options: argparse.Namespace) -> dict[str, float]:
    """One backend."""
    await stage.stub.CreateTopic(pb.CreateTopicRequest(topic=TOPIC))
    subscription = pb.Subscription(name=WORK, topic=TOPIC, ordered=True)
    subscription.ack_deadline.FromSeconds(10)
    subscription.retry.backoff = pb.BACKOFF_IMMEDIATE
    subscription.retry.max_attempts = 1000
    await stage.stub.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
    await stage.settle()
    await stage.employ(options.consumers, WORK, "--refuse", str(options.refuse))
    order, dice, kills = Order(options.messages, options.keys), random.Random(options.seed), 0  # noqa: S311 - repeatable
    began = last = time.monotonic()
    publishing = asyncio.create_task(_publish(stage, options.messages, options.keys))
    done = 0
    while done < options.messages and time.monotonic() - last < QUIET_S:
        kills += await _kill(stage, dice, options.kill_every_s)
        before, done = done, order.read(stage)
        if done > before:
            last = time.monotonic()
    await publishing
    return {
        "messages": options.messages,
        "keys": options.keys,
        "out_of_order": order.out_of_order(),
        "missing": order.missing(),
        "deliveries": order.deliveries,
        "kills": kills,
        "per_s": round(done / (time.monotonic() - began)),
    }


async def _each(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    found = []
    for backend in options.backends:
        async with Stage(folder / backend, broker=backend == "rabbitmq") as stage:
            found.append(await run(stage, options))
        print(json.dumps({"backend": backend, **found[-1]}), flush=True)
    return found


def main() -> None:
    """Run, report, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=50)
    parser.add_argument("--consumers", type=int, default=4)
    parser.add_argument("--refuse", type=float, default=0.05, help="share of deliveries that are refused")
    parser.add_argument("--kill-every-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["sqlite", "rabbitmq"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plexus-order-"))
    try:
        found = asyncio.run(_each(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {key: sum(entry[key] for entry in found) for key in found[0]}
    figures |= {"keys": options.keys, "per_s": min(entry["per_s"] for entry in found)}
    print(json.dumps(figures))
    sys.exit(1 if figures["out_of_order"] or figures["missing"] else 0)


if __name__ == "__main__":
    main()
