"""The edge process as `plexus up` runs it, without any service behind it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from services.gateway import main
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.gateway.config import GatewayConfig

START_S = 60.0


@asynccontextmanager
async def edge_process(state: Path, config: GatewayConfig) -> AsyncIterator[int]:
    """Run it; gives its port."""
    ready, stop, port = asyncio.Event(), asyncio.Event(), free_port()
    running = asyncio.create_task(main.serve(state, port, free_port(), ready.set, stop, config=config))
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({running, waiting}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        yield port
    finally:
        waiting.cancel()
        stop.set()
        await asyncio.gather(running, return_exceptions=True)
        structlog.reset_defaults()
