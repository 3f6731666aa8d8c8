"""When to try again after a failure."""

from __future__ import annotations

import random

import grpc

TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Codes of failures that may pass; the others come back however often a call is repeated."""
_FIRST_S, _LONGEST_S = 0.1, 5.0


def pause_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row, from 1: doubled each time up to 5 s, with jitter."""
    longest = min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load only
