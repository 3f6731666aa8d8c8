"""Retries that are safe: a repeated request_id gets the first answer (google.aip.dev/155)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from services.runtime.errors import InvalidArgumentError
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.descriptor import Descriptor

ResultT = TypeVar("ResultT")

WINDOW_S = 600.0
"""How long an answer is remembered."""
MAX_ANSWERS = 10_000
"""How many answers are remembered."""
MAX_ID_LENGTH = 128


_Key = tuple[str, str, str]


class Retriable(Protocol):
    """A request message with the field that google.aip.dev/155 asks for."""

    DESCRIPTOR: Descriptor

    @property
    def request_id(self) -> str:
        """The caller's name for this very request; empty if it will not repeat it."""
        ...

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:  # noqa: N802 - protobuf's name
        """The message's bytes."""
        ...


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
        self._answers: OrderedDict[_Key, _Answer] = OrderedDict()

    async def once(self, request: Retriable, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Do the work, or give the answer of the first request with this id, waiting for it if it still runs.

        Args:
            request: What is asked for; without a request_id nothing is remembered. Ids of different callers
                and of different methods have nothing to do with each other.
            work: Does it.

        Raises:
            InvalidArgumentError: The id is too long or was used with another content.
        """
        if not request.request_id:
            return await work()
        if len(request.request_id) > MAX_ID_LENGTH:
            raise InvalidArgumentError(f"at most {MAX_ID_LENGTH} characters", field="request_id")
        self._forget_old()
        caller = current().consumer or current().peer
        key = (caller, request.DESCRIPTOR.full_name, request.request_id)
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
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

    def _forget_failure(self, key: _Key, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._answers.pop(key, None)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self._window_s
        while self._answers:
            key, answer = next(iter(self._answers.items()))
            if len(self._answers) < self._max_answers and answer.since_s > oldest:
                return
            del self._answers[key]
