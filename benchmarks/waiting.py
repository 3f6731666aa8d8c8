"""Much that waits: messages nobody consumes, far or equal delays, a consumer that is paused.

In this order, on each backend, over gRPC to a service in a process of its own:

- idle: so many messages delayed by hours; processor time and memory of the service while they wait.
- delayed: so many messages due at the same second; how late the last one came.
- paused: a consumer that takes messages and does nothing; a second consumer of the same subscription, and one
  of another, must get all the others.
- waiting: so many messages that nobody consumes; how the service's memory grew after the first tenth.

With the messages of `idle` and of `waiting` there, each time: how long GetStats takes, how long after a
kill -9 of the service, and of RabbitMQ, the subscription is counted (idle) or gives a message (waiting)
again, and how long its deletion takes; and, while it is being counted and deleted, the longest that one
small publish to another topic took.

The last line is one JSON object, the worse of the backends: idle_cpu_percent (bar 2), idle_growth_mib,
delayed_late_s (bar 3), paused_missing, waiting_growth_mib; and of idle and waiting each, in seconds,
stats_s, service_killed_s, broker_killed_s, delete_s, others_s. The exit code is 1 if paused_missing, or if
messages that wait were not all counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc

from benchmarks.broker.plan import KILL, Fault
from benchmarks.broker.stage import Stage
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BATCH, LANES = 1000, 4
PUBLISH_S = 300.0
AGAIN_S = 600.0
FAR_S = 4 * 3600.0
PARTS = ("idle", "delayed", "paused", "waiting")
_TICKS = os.sysconf("SC_CLK_TCK")
Answer = TypeVar("Answer")


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_mib(pid: int) -> float:
    """Memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


class Trial:
    """One backend."""

    def __init__(self, stage: Stage, *, broker: bool) -> None:
        self._stage = stage
        self._stub = stage.stub
        self._broker = broker

    async def _make(self, topic: str, *subscriptions: str) -> None:
        await self._stub.CreateTopic(pb.CreateTopicRequest(topic=topic), timeout=60)
        for name in subscriptions:
            subscription = pb.Subscription(name=name, topic=topic)
            subscription.ack_deadline.FromSeconds(600)
            request = pb.CreateSubscriptionRequest(subscription=subscription)
            await self._stub.CreateSubscription(request, timeout=60)

    async def _publish(self, topic: str, count: int, *, until: float = 0.0, delay_s: float = 0.0) -> None:
        """Publish, delayed by so much or until then."""
        sizes = iter([BATCH] * (count // BATCH) + ([count % BATCH] if count % BATCH else []))

        async def lane() -> None:
            for size in sizes:
                message = pb.Message(data=b"x" * 256)
                wait_s = until - time.time() if until else delay_s
                if wait_s > 0:
                    message.delay.FromMilliseconds(round(wait_s * 1000))
                request = pb.PublishRequest(topic=topic, messages=[message] * size)
                await self._stub.Publish(request, timeout=PUBLISH_S)

        await asyncio.gather(*(lane() for _ in range(LANES)))

    async def _consume(self, subscription: str, count: int, deadline_s: float) -> tuple[int, float]:
        """How many came of so many, and when the last one did."""
        got, last = 0, time.time()
        try:
            async with asyncio.timeout(deadline_s):
                while got < count:
                    request = pb.PullRequest(subscription=subscription, max_messages=1000)
                    request.wait.FromSeconds(10)
                    answer = await self._stub.Pull(request, timeout=60)
                    if answer.deliveries:
                        got, last = got + len(answer.deliveries), time.time()
                        ids = [delivery.ack_id for delivery in answer.deliveries]
                        done = pb.AcknowledgeRequest(subscription=subscription, ack_ids=ids)
                        await self._stub.Acknowledge(done, timeout=60)
        except TimeoutError:
            pass  # `got` says so
        return got, last

    @staticmethod
    def _tell_rate(count: int, began: float) -> None:
        print(f"  {count / (time.monotonic() - began):.0f} messages/s stored", flush=True)

    async def idle(self, count: int, seconds: float) -> dict[str, float]:
        """Far delays."""
        await self._make("idle", "idle")
        pid = self._stage.service.pid
        await self._publish("idle", max(1, count // 10), delay_s=FAR_S)
        before, began = rss_mib(pid), time.monotonic()
        await self._publish("idle", count - count // 10, delay_s=FAR_S)
        self._tell_rate(count - count // 10, began)
        await asyncio.sleep(seconds / 4)  # what publishing left behind is done
        used = cpu_s(pid)
        await asyncio.sleep(seconds)
        percent = (cpu_s(pid) - used) / seconds * 100
        found = {
            "idle_cpu_percent": round(percent, 2),
            "idle_growth_mib": round(max(0.0, rss_mib(pid) - before), 1),
        }
        return found | await self._endure("idle", count)

    async def delayed(self, count: int, delay_s: float) -> dict[str, float]:
        """The same second."""
        await self._make("delayed", "delayed")
        consuming = asyncio.create_task(self._consume("delayed", count, delay_s + 300))
        due = time.time() + delay_s
        await self._publish("delayed", count, until=due)
        if time.time() > due:
            print(f"  publishing took longer than {delay_s:g} s: the lateness counts it")
        got, last = await consuming
        if got < count:
            raise RuntimeError(f"{count - got} delayed messages did not come")
        return {"delayed_late_s": round(max(0.0, last - due), 2)}

    async def paused(self, count: int) -> dict[str, float]:
        """A consumer that does nothing."""
        await self._make("paused", "shared", "apart")
        held, hold = asyncio.Event(), min(100, count // 4)

        async def requests() -> AsyncIterator[pb.StreamingPullRequest]:
            yield pb.StreamingPullRequest(subscription="shared", max_outstanding_messages=hold)
            await asyncio.Event().wait()

        async def pause() -> None:
            call, got = self._stub.StreamingPull(requests()), 0
            async for response in call:
                got += len(response.deliveries)
                if got >= hold:
                    held.set()

        pausing = asyncio.create_task(pause())
        await self._publish("paused", count)
        await asyncio.wait_for(held.wait(), 120)
        shared, apart = await asyncio.gather(
            self._consume("shared", count - hold, 120), self._consume("apart", count, 120)
        )
        pausing.cancel()
        await asyncio.gather(pausing, return_exceptions=True)
        return {"paused_missing": count - hold - shared[0] + count - apart[0]}

    async def waiting(self, count: int) -> dict[str, float]:
        """No consumer."""
        await self._make("waiting", "waiting")
        pid = self._stage.service.pid
        await self._publish("waiting", max(1, count // 10))
        before = rss_mib(pid)
        began = time.monotonic()
        await self._publish("waiting", count - count // 10)
        self._tell_rate(count - count // 10, began)
        found = {"waiting_growth_mib": round(max(0.0, rss_mib(pid) - before), 1)}
        return found | await self._endure("waiting", count)

    # With many there.

    async def _endure(self, name: str, count: int) -> dict[str, float]:
        """Count them, kill what holds them, delete them."""
        found: dict[str, float] = {}
        await self._make(f"others-{name}", f"others-{name}")
        others = asyncio.create_task(self._others(f"others-{name}"))
        found["stats_s"], missing = await self._counted(name, count)
        for target in ("service", "broker") if self._broker else ("service",):
            others.cancel()
            await asyncio.gather(others, return_exceptions=True)
            await self._stage.settle()
            began = time.monotonic()
            await self._stage.suffer(Fault(KILL, target, 0.0, 0.0, 0))
            await (self._counted(name, count) if name == "idle" else self._first(name))
            found[f"{target}_killed_s"] = time.monotonic() - began
            others = asyncio.create_task(self._others(f"others-{name}"))
        missing = max(missing, (await self._counted(name, count))[1])
        began = time.monotonic()
        request = pb.DeleteSubscriptionRequest(subscription=name)
        await self._stub.DeleteSubscription(request, timeout=AGAIN_S)
        found["delete_s"] = time.monotonic() - began
        others.cancel()
        found["others_s"] = await others
        return {f"{name}_{key}": round(value, 2) for key, value in found.items()} | {
            f"{name}_missing": missing
        }

    async def _counted(self, name: str, count: int) -> tuple[float, int]:
        """How long counting takes, and how many are missing."""
        began = time.monotonic()
        stats = await self._again(
            lambda: self._stub.GetStats(pb.GetStatsRequest(subscription=name), timeout=AGAIN_S)
        )
        present = stats.ready + stats.leased + stats.delayed
        return time.monotonic() - began, count - present

    async def _first(self, name: str) -> None:
        """Take one and give it back."""
        request = pb.PullRequest(subscription=name, max_messages=1)
        request.wait.FromSeconds(20)
        while True:
            answer = await self._again(lambda: self._stub.Pull(request, timeout=60))
            if answer.deliveries:
                break
        free = pb.Extension(ack_id=answer.deliveries[0].ack_id)
        back = pb.ModifyAckDeadlineRequest(subscription=name, extensions=[free])
        await self._stub.ModifyAckDeadline(back, timeout=60)

    @staticmethod
    async def _again(call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask until it is answered."""
        until = time.monotonic() + AGAIN_S
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    async def _others(self, name: str) -> float:
        """Publish one small message after another until cancelled; the longest that one took, in seconds."""
        longest, began = 0.0, time.monotonic()
        request = pb.PublishRequest(topic=name, messages=[pb.Message(data=b"x")])
        try:
            while True:
                began = time.monotonic()
                await self._again(lambda: self._stub.Publish(request, timeout=PUBLISH_S))
                longest = max(longest, time.monotonic() - began)
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            return max(longest, time.monotonic() - began)


async def run(options: argparse.Namespace, backend: str, folder: Path) -> dict[str, float]:
    """One backend."""
    print(f"{backend}: load {os.getloadavg()[0]:.1f}", flush=True)
    found: dict[str, float] = {}
    async with Stage(folder / backend, broker=backend == "rabbitmq") as stage:
        trial = Trial(stage, broker=backend == "rabbitmq")
        steps: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
            "idle": lambda: trial.idle(options.idle, options.idle_s),
            "delayed": lambda: trial.delayed(options.delayed, options.delay_s),
            "paused": lambda: trial.paused(options.paused),
            "waiting": lambda: trial.waiting(options.waiting),
        }
        for name in options.parts:
            began = time.monotonic()
            found |= await steps[name]()
            load = os.getloadavg()[0]
            print(f"  {name}: {time.monotonic() - began:.0f} s, load {load:.1f}, {found}", flush=True)
    return found


def main() -> None:
    """Run, report, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--idle", type=int, default=1_000_000)
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--delayed", type=int, default=10_000)
    parser.add_argument("--delay-s", type=float, default=20.0)
    parser.add_argument("--paused", type=int, default=5_000)
    parser.add_argument("--waiting", type=int, default=1_000_000)
    parser.add_argument("--backends", nargs="+", default=["sqlite", "rabbitmq"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plexus-waiting-"))
    try:
        found = [asyncio.run(run(options, backend, folder)) for backend in options.backends]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = dict.fromkeys(key for figures in found for key in figures)
    worst = {key: max(figures[key] for figures in found if key in figures) for key in names}
    print(json.dumps(worst))
    sys.exit(1 if any(worst[key] for key in worst if key.endswith("_missing")) else 0)


if __name__ == "__main__":
    main()
