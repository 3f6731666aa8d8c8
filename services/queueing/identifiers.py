"""Ids of messages."""

from __future__ import annotations

import os
import time

_RANDOM_BYTES = 10


def message_ids(count: int) -> list[str]:
    """Ids of 32 hexadecimal digits that nobody else has.

    They begin with the time: what is stored together stands together in an index, however large it is.
    """
    moment, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(_RANDOM_BYTES * count).hex()
    width = 2 * _RANDOM_BYTES
    return [moment + random[start : start + width] for start in range(0, width * count, width)]
