"""A broker on RabbitMQ with the database of its state."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from services.queueing.backends.rabbit import RabbitBroker
from services.queueing.state import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def rabbit_broker(url: str, state: str | Path, **settings: Any) -> AsyncIterator[RabbitBroker]:
    """Open a broker; `state` is a database's URL, or a SQLite file.

    It does not wait for new queues to be on disk, which no test but those that kill RabbitMQ needs.
    """
    settings = {"settle_s": 0.0, **settings}
    async with (
        Database(state if isinstance(state, str) else f"sqlite:///{state}") as database,
        RabbitBroker(url, database, **settings) as broker,
    ):
        yield broker
