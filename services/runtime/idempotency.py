"""Retries that are safe: a repeated request_id gets the first answer (google.aip.dev/155)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ResultT = TypeVar("ResultT")

WINDOW_S = 600.0
"""How long an answer is remembered."""
MAX_ANSWERS = 10_000
"""How many answers are remembered."""
MAX_ID_LENGTH = 128


@dataclass(slots=True)
class _Answer:
    content: bytes
    future: asyncio.Future[Any]
    since_s: float


class Answers:
    """Remembers the answers to recent requests, within this process; failures are not remembered."""

    def __init__(self, window_s: float = WINDOW_S, max_answers: int = MAX_ANSWERS) -> None:
        self._window_s = window_s
        self._max_answers = max_answers
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()

    async def once(
        self, method: str, request_id: str, content: bytes, work: Callable[[], Awaitable[ResultT]]
    ) -> ResultT:
        """Do the work, or give the answer of the first request with this id, waiting for it if it still runs.

        Args:
            method: Name of the RPC.
            request_id: The caller's; empty does the work without remembering.
            content: The serialized request.
            work: What the request asks for.

        Raises:
            InvalidArgumentError: The id is too long or was used with another content.
        """
        if not request_id:
            return await work()
        if len(request_id) > MAX_ID_LENGTH:
            raise InvalidArgumentError(f"at most {MAX_ID_LENGTH} characters", field="request_id")
        self._forget_old()
        key, digest = (method, request_id), hashlib.sha256(content).digest()
        known = self._answers.get(key)
        if known is None:
            known = _Answer(digest, asyncio.ensure_future(work()), time.monotonic())
            self._answers[key] = known
            known.future.add_done_callback(lambda future: self._forget_failure(key, future))
        elif known.content != digest:
            raise InvalidArgumentError(
                "was used with another request", field="request_id", reason="REQUEST_ID_REUSED"
            )
        # Shielded: the work goes on for the retry when the first caller goes away.
        result: ResultT = await asyncio.shield(known.future)
        return result

    def _forget_failure(self, key: tuple[str, str], future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._answers.pop(key, None)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self._window_s
        while self._answers:
            key, answer = next(iter(self._answers.items()))
            if len(self._answers) < self._max_answers and answer.since_s > oldest:
                return
            del self._answers[key]
