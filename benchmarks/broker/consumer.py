"""A consumer as a process of its own, which writes down what it is given before it acknowledges."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
import zlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from plexus.client import RejectError, Subscriber
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub
from tests.servers.queueing import channel

if TYPE_CHECKING:
    from plexus.queueing.v1 import queueing_pb2 as pb

CONCURRENCY = 32


def fate(name: str) -> str:
    """What becomes of a message: `fine`; or so in the end, or not: `poison`, `refused`."""
    number = zlib.crc32(name.encode()) % 200
    if number < 2:
        return ("poison", "refused")[number]
    if number < 20:
        return "flaky" if number < 14 else "slow"
    return "fine"


async def _run(target: str, file: Path, subscription: str, refuse: float) -> None:
    ledger = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(delivery: pb.Delivery, what: str) -> None:
        entry = {
            "name": delivery.data.decode(),
            "id": delivery.message_id,
            "attempt": delivery.attempt,
            "what": what,
            "at": time.time(),
        }
        os.write(ledger, json.dumps(entry).encode() + b"\n")

    async def refusing(delivery: pb.Delivery) -> None:
        if random.random() < refuse:  # noqa: S311 - spreads failures only
            note(delivery, "failed")
            raise ValueError("by chance")
        note(delivery, "consumed")

    async def handle(delivery: pb.Delivery) -> None:
        kind = fate(delivery.data.decode())
        if kind == "refused":
            note(delivery, "refused")
            raise RejectError("refused")
        if kind == "poison" or (kind == "flaky" and delivery.attempt == 1):
            note(delivery, "failed")
            raise ValueError(kind)
        if kind == "slow":
            await asyncio.sleep(0.2)
        note(delivery, "consumed")

    async with channel(target) as opened:
        stub = QueueingServiceStub(opened)
        last: deque[Exception] = deque(maxlen=1)  # failures are meant: not to be logged
        handler = refusing if refuse else handle
        await Subscriber(stub, subscription, handler, concurrency=CONCURRENCY, on_error=last.append).run()


def main() -> None:
    """Consume until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--subscription", required=True)
    parser.add_argument("--refuse", type=float, default=0.0, help="this share by chance, not by name")
    options = parser.parse_args()
    asyncio.run(_run(options.target, options.file, options.subscription, options.refuse))


if __name__ == "__main__":
    main()
