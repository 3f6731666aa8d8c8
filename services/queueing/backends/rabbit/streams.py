"""Streams of exclusive subscriptions: one at a time among all replicas."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.peers import GoneError
from services.queueing.exclusive import Holders, in_use
from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.queueing.backends.rabbit.claims import Claims
    from services.queueing.backends.rabbit.peers import Peers


class Streams:
    """Who streams from an exclusive subscription, by leases if the state is shared."""

    def __init__(self, claims: Claims, peers: Peers, *, shared: bool) -> None:
        self._claims = claims
        self._peers = peers
        self._shared = shared
        self._holders = Holders()

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """See Broker."""
        with self._holders.hold(name):
            if not self._shared:
                yield
                return
            lease, loop = f"exclusive/{name}", asyncio.get_running_loop()
            try:
                async with asyncio.timeout(None) as scope:
                    await self._take(name, lease, lambda: scope.reschedule(loop.time()))
                    try:
                        yield
                    finally:
                        await asyncio.shield(self._claims.drop(lease))
            except TimeoutError:
                if not scope.expired():
                    raise
                raise UnavailableError(
                    "the subscription is not ours alone any more", dependency="state", reason="LEASE_LOST"
                ) from None

    async def _take(self, name: str, lease: str, lost: Callable[[], None]) -> None:
        for _ in range(2):
            owner = await self._claims.take(lease, lost)
            if owner == self._peers.address:
                return
            try:
                await self._peers.ask(owner, {"what": "here"})
            except GoneError:
                await self._claims.evict(lease, owner)
            except UnavailableError:
                break
        raise in_use(name)
