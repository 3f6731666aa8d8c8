"""Spans of time, and rates, as people write them."""

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


def per_second(text: str) -> float:
    """Read a rate: `10/s`, `30/m` or `100/h`.

    Raises:
        InvalidArgumentError: It is none of these, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)/([smh])", text.strip())
    if match is None or not float(match[1]):
        raise InvalidArgumentError(f"{text!r} is no rate: write 10/s, 30/m or 100/h")
    return float(match[1]) / _UNITS_S[match[2]]
