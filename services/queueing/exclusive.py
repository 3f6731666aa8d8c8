"""Subscriptions that only one consumer at a time may stream."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterator


def in_use(subscription: str) -> FailedPreconditionError:
    """The error for a second consumer."""
    return FailedPreconditionError(
        f"subscription {subscription!r} has its one consumer",
        reason="SUBSCRIPTION_IN_USE",
        metadata={"subscription": subscription},
    )


class Holders:
    """The subscriptions that consumers of this process have for themselves."""

    def __init__(self) -> None:
        self._held: set[str] = set()

    @contextmanager
    def hold(self, subscription: str) -> Iterator[None]:
        """Have a subscription during the block.

        Raises:
            FailedPreconditionError: Somebody else has it.
        """
        if subscription in self._held:
            raise in_use(subscription)
        self._held.add(subscription)
        try:
            yield
        finally:
            self._held.discard(subscription)
