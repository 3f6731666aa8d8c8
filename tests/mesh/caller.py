"""A caller of mesh services in a process of its own, since gRPC reads its xDS bootstrap once a process.

Takes one JSON object a line, {"id": …, "count": …, …}, and answers each with one, as they end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import grpc.aio

from plexus.client.channel import Mesh

METHOD = "/test.Who/Ask"


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the protocol with the test


class Caller:
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def call(self, seen: Counter[str], command: dict[str, Any]) -> None:
        ask: Any = self._mesh.channel(command.get("service", "vectors")).unary_unary(
            command.get("method", METHOD)
        )
        metadata = [tuple(pair) for pair in command.get("headers", {}).items()]
        try:
            answer: bytes = await ask(b"", timeout=command.get("timeout", 60), metadata=metadata)
            seen[answer.decode()] += 1
        except grpc.aio.AioRpcError as error:
            seen[f"{error.code().name}: {error.details()}"] += 1

    async def calls(self, command: dict[str, Any]) -> dict[str, Any]:
        """Make `count` calls, `at_once` at a time; who answered, and how long it took."""
        seen: Counter[str] = Counter()
        left = command.get("count", 1)
        started = time.monotonic()

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.call(seen, command)

        await asyncio.gather(*(worker() for _ in range(command.get("at_once", 1))))
        return {"seen": seen, "seconds": time.monotonic() - started}


async def main() -> None:
    async with Mesh() as mesh:
        caller = Caller(mesh)
        say(ready=True)
        running: set[asyncio.Task[None]] = set()

        async def answer(command: dict[str, Any]) -> None:
            say(id=command["id"], **await caller.calls(command))

        while line := await asyncio.to_thread(sys.stdin.readline):
            task = asyncio.create_task(answer(json.loads(line)))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(main())
