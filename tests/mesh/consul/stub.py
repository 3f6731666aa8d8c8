"""An HTTP server that misbehaves as told: what no real Consul does on demand."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

from services.mesh.consul.config import ConsulConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType


def blocking(request: web.Request) -> bool:
    return "index" in request.query


def answer(body: Any, index: str | None, *, status: int = 200) -> web.Response:
    headers = {} if index is None else {"X-Consul-Index": index}
    text = body if isinstance(body, str) else json.dumps(body)
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


class Stub:
    """Answers every GET by `answering`, and remembers when it was asked and how."""

    def __init__(self, answering: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self.answering = answering
        self.asked: deque[tuple[float, dict[str, str]]] = deque(maxlen=10_000)
        self.arrived = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self.config = ConsulConfig()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((time.monotonic(), dict(request.query)))
        async with self.arrived:
            self.arrived.notify_all()
        return await self.answering(request)

    async def requests(self, count: int) -> list[dict[str, str]]:
        """Wait until there were so many requests; their queries."""
        async with asyncio.timeout(60), self.arrived:
            await self.arrived.wait_for(lambda: len(self.asked) >= count)
        return [query for _, query in self.asked]

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_get("/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.config = ConsulConfig(address=f"http://127.0.0.1:{port}", wait_s=1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
