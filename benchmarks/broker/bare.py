"""What the bare libraries do: aio-pika on a quorum queue, SQLite with an fsync for each transaction."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import TYPE_CHECKING

import aio_pika

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

IN_FLIGHT, BATCH, PREFETCH = 256, 100, 100


async def rate(count: int, work: Awaitable[None]) -> float:
    """How many a second."""
    began = time.perf_counter()
    await work
    return count / (time.perf_counter() - began)


async def in_flight(count: int, lanes: int, one: Callable[[], Awaitable[object]]) -> None:
    """Do something so often, so many at once."""

    async def lane(number: int) -> None:
        for _ in range(number, count, lanes):
            await one()

    await asyncio.gather(*(lane(number) for number in range(lanes)))


async def bare_rabbit(url: str, count: int, size: int) -> tuple[float, float]:
    """Publishing and consuming a second with aio-pika alone, on a quorum queue."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("bare", durable=True, arguments={"x-queue-type": "quorum"})
        exchange = channel.default_exchange
        message = aio_pika.Message(b"x" * size, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        publishing = await rate(
            count, in_flight(count, IN_FLIGHT, lambda: exchange.publish(message, "bare", mandatory=True))
        )
        consumer = await connection.channel()
        await consumer.set_qos(prefetch_count=PREFETCH)
        queue = await consumer.get_queue("bare", ensure=False)
        left, done = count, asyncio.Event()

        async def take(incoming: aio_pika.abc.AbstractIncomingMessage) -> None:
            nonlocal left
            await incoming.ack()
            left -= 1
            if left == 0:
                done.set()

        async def run() -> None:
            await queue.consume(take)
            await done.wait()

        return publishing, await rate(count, run())


def bare_sqlite(file: Path, count: int, size: int) -> float:
    """Inserts a second in transactions of a batch, each on the disk when it is committed."""
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
    data, began = b"x" * size, time.perf_counter()
    for _ in range(count // BATCH):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO messages (data) VALUES (?)", [(data,)] * BATCH)
        db.execute("COMMIT")
    elapsed = time.perf_counter() - began
    db.close()
    return count / elapsed
