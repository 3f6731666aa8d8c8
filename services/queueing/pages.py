"""Pages that fit into a message on the wire, whatever their entries hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from services.queueing.domain import MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from google.protobuf.message import Message

PAGE_BYTES = MAX_DATA_BYTES + 2 * 1024 * 1024
"""Of one page: an entry with the largest content, its attributes and its history fit."""
_FIRST = 16
"""Entries that are read before it is known how large they are."""


Entry = TypeVar("Entry")
Shown = TypeVar("Shown", bound="Message")


async def page(
    read: Callable[[int, int], Awaitable[Sequence[Entry]]],
    show: Callable[[Entry], Shown],
    position: Callable[[Entry], int],
    *,
    after: int,
    limit: int,
) -> tuple[list[Shown], int | None]:
    """As many entries as fit, at least one if there is any.

    Args:
        read: Gives entries after a position, up to a number of them.
        show: Makes an entry a message.
        position: Of an entry.
        after: Where to begin.
        limit: At most this many.

    Returns:
        The messages; and the position of the last one, None if nothing comes after it.
    """
    shown: list[Shown] = []
    size, step = 0, _FIRST
    while True:
        asked = min(step, limit + 1 - len(shown))
        found = await read(after, asked)
        for entry in found:
            made = show(entry)
            size += made.ByteSize()
            if len(shown) == limit or (shown and size > PAGE_BYTES):
                return shown, after
            shown.append(made)
            after = position(entry)
        if len(found) < asked:
            return shown, None
        step = max(1, PAGE_BYTES * len(shown) // max(1, size))


def fitting(messages: Iterable[Shown]) -> tuple[list[Shown], list[Shown]]:
    """Those that fit into one message, at least the first; and the rest."""
    every = list(messages)
    size = 0
    for number, message in enumerate(every):
        size += message.ByteSize()
        if number and size > PAGE_BYTES:
            return every[:number], every[number:]
    return every, []
