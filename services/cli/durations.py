"""Spans of time as people write them."""

from __future__ import annotations

import re

from services.runtime.errors import InvalidArgumentError

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


def seconds(text: str) -> float:
    """Read `90s`, `15m`, `1h`, `7d`, or plain seconds.

    Raises:
        InvalidArgumentError: It is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise InvalidArgumentError(f"{text!r} is no span of time: write 90s, 15m, 1h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]
