"""What this replica has leased in the state for as long as it lives: its address, subscriptions, streams."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from services.queueing.backends.rabbit.state import REPLICA
from services.runtime.errors import PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.backends.rabbit.peers import Peers
    from services.queueing.state.leases import Leases

log = structlog.get_logger(__name__)


class Claims:
    """Leases under the replica's address, renewed until they are dropped; `run` is its life."""

    def __init__(self, leases: Leases, peers: Peers) -> None:
        self._leases = leases
        self._peers = peers
        self._address = ""
        self._until: dict[str, float] = {}
        self._lost: dict[str, Callable[[], None]] = {}

    def has(self, name: str) -> bool:
        """Whether a lease is ours now, by our own clock."""
        return self._until.get(name, 0.0) > time.monotonic() and self._address == self._peers.address

    @property
    def own(self) -> str:
        """The lease that says that this replica lives; empty while it has none."""
        name = REPLICA + self._peers.address
        return name if self.has(name) else ""

    async def take(self, name: str, lost: Callable[[], None]) -> str:
        """Take a lease; who has it now. `lost` is called once if it is ours and ends against our will.

        Raises:
            UnavailableError: The state or the broker cannot be reached.
        """
        address = await self._peers.ready()
        self._move(address)
        if not self.has(name):
            began = time.monotonic()
            owner = await self._leases.take(name, address)
            if owner != address or address != self._peers.address:
                return owner
            self._until[name] = began + self._leases.ttl_s
        self._lost[name] = lost
        return address

    def guard(self, name: str) -> Callable[[AsyncConnection], Awaitable[None]]:
        """For a transaction that is to be made only while a lease is ours: it raises when it is not.

        A replica that was stopped and goes on may not know yet that another one has the lease.
        """
        owner = self._address

        async def check(connection: AsyncConnection) -> None:
            if not await self._leases.keeps(connection, name, owner):
                raise UnavailableError(
                    "another replica has the subscription now", reason="LEASE_LOST", retry_after_s=1
                )

        return check

    async def evict(self, name: str, owner: str) -> None:
        """End the lease of a replica that is gone."""
        await self._leases.release(owner, [name])

    async def drop(self, name: str) -> None:
        """Give a lease back."""
        self._lost.pop(name, None)
        if self._until.pop(name, None) is not None:
            try:
                await self._leases.release(self._address, [name])
            except PlexusError as error:
                log.info("lease_not_released", reason=error.reason)  # it ends by itself

    async def others(self) -> list[str]:
        """The addresses of all other replicas."""
        return [owner for owner in await self._leases.owners(REPLICA) if owner != self._peers.address]

    async def run(self) -> None:
        """Renew, for ever."""
        while True:
            try:
                await self._renew()
            except PlexusError as error:
                log.warning("leases_not_renewed", reason=error.reason)
            self._end_old()
            await asyncio.sleep(self._leases.ttl_s / 5)

    async def close(self) -> None:
        """Give all back."""
        names = list(self._until)
        self._until.clear()
        self._lost.clear()
        if names:
            try:
                await self._leases.release(self._address)
            except PlexusError as error:
                log.info("leases_not_released", reason=error.reason)

    async def _renew(self) -> None:
        address = await self._peers.ready()
        self._move(address)
        if not self.has(REPLICA + address):
            await self.take(REPLICA + address, lambda: None)
        began = time.monotonic()
        names = set(self._until)
        kept = await self._leases.renew(address, names)
        for name in names:
            if name in kept and name in self._until:
                self._until[name] = began + self._leases.ttl_s
            else:
                self._until.pop(name, None)

    def _move(self, address: str) -> None:
        """With another address, all that was leased under the one before is lost."""
        if address != self._address:
            self._address = address
            self._until.clear()
            self._end_old()

    def _end_old(self) -> None:
        now = time.monotonic()
        for name in [name for name in self._lost if self._until.get(name, 0.0) <= now]:
            self._until.pop(name, None)
            self._lost.pop(name)()
