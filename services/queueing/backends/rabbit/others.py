"""What this replica asks of the others: messages of what they have, and to settle what they gave out."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

from services.queueing.backends.rabbit.peers import GoneError, address_in
from services.queueing.backends.rabbit.state import REPLICA
from services.queueing.backends.rabbit.wire import Carried, from_head, head
from services.queueing.domain import Delivery
from services.runtime.errors import PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.queueing.backends.rabbit.claims import Claims
    from services.queueing.backends.rabbit.peers import Peers

FORWARD_S = 5.0
"""How long one replica waits for messages at another."""
_FORWARD_BYTES = 4 * 1024 * 1024
_RETRY_S = 0.1
_LOOK_S = 2.0

Say = dict[str, Any]


class Others:
    """The other replicas; none unless the state is shared."""

    def __init__(self, peers: Peers, claims: Claims, *, shared: bool) -> None:
        self._peers = peers
        self._claims = claims
        self._shared = shared

    async def ask_all(self, question: Say) -> list[Say | PlexusError]:
        """Ask every other replica; what each says, nothing of those that are gone."""
        if not self._shared:
            return []

        async def ask(address: str) -> Say | PlexusError:
            try:
                return await self._peers.ask(address, question)
            except GoneError:
                return {}
            except PlexusError as error:
                return error

        return await asyncio.gather(*map(ask, await self._claims.others()))

    async def look_for(self, holder: str) -> None:
        """End the lease of a replica, given by it, that is no more: RabbitMQ knows it earlier."""
        address = holder.removeprefix(REPLICA)
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._peers.ask(address, {"what": "here"})
        except GoneError:
            await self._claims.evict(holder, address)
        except (TimeoutError, UnavailableError):
            return  # it lives, for all that we know

    async def pull(
        self, owner: str, name: str, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        """Pull from the replica that has an ordered subscription, for so long as it may be asked."""
        wait_s = min(wait_s, FORWARD_S)
        question = {
            "what": "pull",
            "subscription": name,
            "max_messages": max_messages,
            "max_bytes": min(max_bytes, _FORWARD_BYTES),
            "wait_s": wait_s,
        }
        try:
            answer = await self._peers.ask(owner, question, wait_s=wait_s)
        except GoneError:
            await self._claims.evict(ordered(name), owner)
            return []
        if "moved" in answer:
            await asyncio.sleep(_RETRY_S)
            return []
        return [_delivery(said) for said in answer["deliveries"]]

    async def settle(
        self,
        name: str,
        what: str,
        said: Sequence[tuple[str, Any]],
        here: Callable[[Sequence[Any]], Awaitable[list[str]]],
    ) -> list[str]:
        """Tell each replica what is said of its leases; the ids of those that had ended."""
        groups: dict[str, list[tuple[str, Any]]] = {}
        for ack_id, entry in said:
            address = address_in(ack_id)
            groups.setdefault("" if address == self._peers.address else address, []).append((ack_id, entry))

        async def tell(address: str, entries: list[tuple[str, Any]]) -> list[str]:
            if not address or not self._shared:
                return await here([entry for _, entry in entries])
            question = {"what": what, "subscription": name, "leases": [entry for _, entry in entries]}
            try:
                return list((await self._peers.ask(address, question))["expired"])
            except GoneError:
                return [ack_id for ack_id, _ in entries]  # its messages are with the broker again

        results = await asyncio.gather(*(tell(*group) for group in groups.items()), return_exceptions=True)
        expired: list[str] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            expired += result
        return expired


def ordered(name: str) -> str:
    """The lease of an ordered subscription."""
    return f"ordered/{name}"


def said_of(delivery: Delivery) -> Say:
    """A delivery, as replicas tell it each other."""
    return {
        "ack_id": delivery.ack_id,
        "attempt": delivery.attempt,
        "message_id": delivery.message.message_id,
        "head": head(Carried(delivery.message)),
        "data": base64.b64encode(delivery.data).decode(),
    }


def _delivery(said: Say) -> Delivery:
    message = from_head(said["head"], said["message_id"], base64.b64decode(said["data"])).stored
    return Delivery(said["ack_id"], message, said["attempt"])
