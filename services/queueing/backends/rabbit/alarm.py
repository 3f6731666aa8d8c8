"""When a window has something to do, and its pullers something to take."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import structlog

from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

_REST_S = 0.01
_RETRY_S = 0.2
_LONGEST_S = 60.0


class Alarm:
    """Times are seconds since 1970; `run` is its life."""

    def __init__(self) -> None:
        """Nothing is planned."""
        self._news = asyncio.Event()
        self._timer = asyncio.Event()
        self._planned = 0.0

    def news(self) -> asyncio.Event:
        """Set when something becomes ready from now on."""
        if self._news.is_set():
            self._news = asyncio.Event()
        return self._news

    def wake(self) -> None:
        """Something is ready."""
        self._news.set()

    def plan(self, at: float) -> None:
        """See to it that what is due then is done then."""
        if at < self._planned:
            self._timer.set()

    async def run(
        self, name: str, work: Callable[[], Awaitable[None]], next_time: Callable[[float], float]
    ) -> None:
        """Do what there is to do at its time, for ever.

        Args:
            name: For the log.
            work: What there is to do now; what it did not do is done at the next call.
            next_time: When there is more, asked with the present time.
        """
        while True:
            self._timer.clear()
            self._planned = math.inf
            try:
                await work()
            except PlexusError as error:
                log.warning("messages_not_settled", subscription=name, reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            now = time.time()
            self._planned = min(next_time(now), now + _LONGEST_S)
            await asyncio.sleep(_REST_S)
            try:
                async with asyncio.timeout(max(0.0, self._planned - time.time())):
                    await self._timer.wait()
            except TimeoutError:
                continue
