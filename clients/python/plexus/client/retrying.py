"""When to try again after a failure."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)

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


async def persist(call: Callable[[], Awaitable[ResultT]], *, within_s: float) -> ResultT:
    """Make a call that may be repeated, again while its failure may pass.

    Args:
        call: Makes the call.
        within_s: No new attempt after so many seconds.

    Raises:
        grpc.RpcError: The last failure.
    """
    ends, failures = time.monotonic() + within_s, 0
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            failures += 1
            pause = pause_s(failures)
            if error.code() not in TRANSIENT or time.monotonic() + pause > ends:
                raise
            log.warning("trying again in %.1f s: %s", pause, error.details())
            await asyncio.sleep(pause)
