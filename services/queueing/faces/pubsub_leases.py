"""Leases of Pub/Sub's clients: settled and extended, with what is told of those that had ended."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.queueing.domain import MAX_BATCH, Refusal
from services.runtime.errors import (
    AbortedError,
    InvalidArgumentError,
    PlexusError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.queueing.domain import Broker
    from services.queueing.faces.pubsub_stream import Outstanding

INVALID = "PERMANENT_FAILURE_INVALID_ACK_ID"
"""What the clients look for in ErrorInfo, under the id of an acknowledgement that failed for good."""
_TOLD_BYTES = 5000
"""Of the ids in one error: gRPC refuses trailers of more than 8 KiB, unless the client raised that."""
_MAX_ID = 1000
_REMEMBERED = 100_000


@dataclass(slots=True)
class Settled:
    """What became of ids: done, ended before, or unknown because the broker was away."""

    done: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    error: PlexusError | None = None

    def raise_failures(self) -> None:
        """Tell a client that wants to know, as Google's clients understand it.

        They take every id as failed that an error does not name, except after errors that pass: then they
        send those again. So an error that is not about all ids, or cannot name all, is one that passes.

        Raises:
            PlexusError: Not all is done.
        """
        if self.error is not None:
            raise self.error
        if not self.invalid:
            return
        told = _told(self.invalid)
        if self.done or len(told) < len(self.invalid):
            raise AbortedError(
                "the leases of some messages had ended; send the other ids again",
                reason="SOME_LEASES_ENDED",
                metadata=told,
            )
        raise InvalidArgumentError(
            "the leases of these messages had ended", field="ack_ids", reason="LEASES_ENDED", metadata=told
        )


def _told(ack_ids: Sequence[str]) -> dict[str, str]:
    """As many as fit, one at least."""
    told: dict[str, str] = {}
    left = _TOLD_BYTES
    for ack_id in ack_ids:
        left -= len(ack_id) + len(INVALID)
        if told and left < 0:
            break
        told[ack_id] = INVALID
    return told


def check_ids(ack_ids: Sequence[str]) -> None:
    """Apply the bounds of acknowledgement ids.

    Raises:
        InvalidArgumentError: There are none, or one is too long.
    """
    if not ack_ids:
        raise InvalidArgumentError("needs some", field="ack_ids")
    if any(len(ack_id) > _MAX_ID for ack_id in ack_ids):
        raise InvalidArgumentError(f"at most {_MAX_ID} characters each", field="ack_ids")


class Leases:
    """Acknowledges, refuses and extends for one process.

    What was settled is remembered for a while, so that a client whose answer was lost may ask again.
    """

    def __init__(self, broker: Broker, outstanding: Outstanding) -> None:
        self._broker = broker
        self._outstanding = outstanding
        self._settled: OrderedDict[tuple[str, str], bool] = OrderedDict()

    async def acknowledge(self, name: str, ack_ids: Sequence[str]) -> Settled:
        """Be done with messages."""
        return await self._settle(name, ack_ids, self._broker.acknowledge, acknowledged=True)

    async def refuse(self, name: str, ack_ids: Sequence[str]) -> Settled:
        """Give messages back."""

        async def nack(name: str, ack_ids: Sequence[str]) -> list[str]:
            return await self._broker.nack(name, [Refusal(ack_id) for ack_id in ack_ids])

        return await self._settle(name, ack_ids, nack, acknowledged=False)

    async def extend(self, name: str, ack_ids: Sequence[str], seconds: float) -> Settled:
        """Set when leases end."""

        async def extend(name: str, ack_ids: Sequence[str]) -> list[str]:
            return await self._broker.extend(name, [(ack_id, seconds) for ack_id in ack_ids])

        settled = await _in_batches(name, ack_ids, extend)
        self._outstanding.extended(settled.done, seconds)
        self._outstanding.settled(settled.invalid)
        return settled

    async def modify(self, name: str, ack_ids: Sequence[str], seconds: int) -> Settled:
        """Set when leases end; no time is a refusal, as there."""
        if seconds:
            return await self.extend(name, ack_ids, float(seconds))
        return await self.refuse(name, ack_ids)

    async def _settle(
        self,
        name: str,
        ack_ids: Sequence[str],
        work: Callable[[str, Sequence[str]], Awaitable[list[str]]],
        *,
        acknowledged: bool,
    ) -> Settled:
        before = [i for i in ack_ids if self._settled.get((name, i)) is acknowledged]
        known = set(before)
        settled = await _in_batches(name, [i for i in ack_ids if i not in known], work)
        for ack_id in settled.done:
            self._settled[name, ack_id] = acknowledged
        while len(self._settled) > _REMEMBERED:
            self._settled.popitem(last=False)
        settled.done += before
        self._outstanding.settled([*settled.done, *settled.invalid])
        return settled


async def _in_batches(
    name: str, ack_ids: Sequence[str], work: Callable[[str, Sequence[str]], Awaitable[list[str]]]
) -> Settled:
    settled = Settled()
    unique = list(dict.fromkeys(ack_ids))
    for start in range(0, len(unique), MAX_BATCH):
        batch = unique[start : start + MAX_BATCH]
        try:
            ended = set(await work(name, batch))
        except (UnavailableError, ResourceExhaustedError) as error:
            settled.error = error
            settled.failed += unique[start:]
            break
        settled.invalid += [ack_id for ack_id in batch if ack_id in ended]
        settled.done += [ack_id for ack_id in batch if ack_id not in ended]
    return settled
