"""Turns at even intervals."""

from __future__ import annotations

import asyncio


class Pace:
    """Lets so many begin in a second, one after the other, until it is stopped."""

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1 / per_second
        self._next = 0.0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Whoever waits, or comes later, is cancelled."""
        self._stopped.set()

    async def turn(self) -> None:
        """Wait for a turn.

        Raises:
            CancelledError: It was stopped.
        """
        now = asyncio.get_running_loop().time()
        at = max(now, self._next)
        self._next = at + self._interval_s
        if at > now:
            try:
                async with asyncio.timeout_at(at):
                    await self._stopped.wait()
            except TimeoutError:
                return
        if self._stopped.is_set():
            raise asyncio.CancelledError
