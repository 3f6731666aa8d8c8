"""Results that outlive who asked: in a log, for a bounded time, found by the id of the task.

Before a task is sent, the log says that its result is expected; so a task that still runs is told from one
that nobody sent, or whose result is not kept any more.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from plexus.client.replies import CALL_ID, REPLY, Request
from plexus.client.results import Handle, present
from plexus.client.retrying import persist
from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import TypeAdapter

    from plexus.queueing.v1 import queueing_pb2_grpc

R = TypeVar("R")

KEEP = "plexus-results"
"""Attribute of a request: the log in which its result is kept."""
EXPECTED = "expected"
"""Kind of the event that comes before a result."""
MAX_KEEP_S = 366 * 24 * 3600.0
_CLOCKS_S = 600.0
"""How much the clocks of the sender and the service may differ."""
_SHORTEST_S, _LONGEST_S = 0.05, 2.0


class ResultNotFoundError(LookupError):
    """No result of this id is kept, nor expected: it was never asked for, or its time is over."""


def new_id() -> str:
    """An id of a task: when it was made, and chance."""
    return f"{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:20]}"


def log_of(queue: str) -> str:
    """The log of the results of a queue's tasks."""
    return f"{queue}.results"


async def declare_log(stub: queueing_pb2_grpc.QueueingServiceStub, queue: str, keep_s: float) -> None:
    """Make the log, unless it is there; present settings stay."""
    settings = pb.Topic(log=True)
    settings.retention.FromMilliseconds(round(keep_s * 1000))
    with present():
        await stub.CreateTopic(pb.CreateTopicRequest(topic=log_of(queue), settings=settings))


def expected(call_id: str) -> pb.Message:
    """What the log says before the result is there."""
    return pb.Message(attributes={CALL_ID: call_id, REPLY: EXPECTED}, ordering_key=call_id)


def kept_of(attributes: Mapping[str, str]) -> Request | None:
    """Where the result of a message is kept; None if it is not."""
    log, call_id = attributes.get(KEEP, ""), attributes.get(CALL_ID, "")
    return Request(log, call_id, 0.0) if log and call_id else None


async def find(
    stub: queueing_pb2_grpc.QueueingServiceStub,
    queue: str,
    call_id: str,
    returns: TypeAdapter[R],
    *,
    timeout_s: float,
) -> R:
    """Wait for a result that any process asked for.

    Raises:
        ResultNotFoundError: Nobody did, or it is not kept any more.
        TimeoutError: It did not come in time.
        TaskFailedError: The task was given up.
        grpc.RpcError: The service refused.
    """
    request = pb.ListEventsRequest(topic=log_of(queue), filter=pb.EventFilter(ordering_key=call_id))
    try:
        after = int(call_id[:12], 16) / 1000 - _CLOCKS_S
        request.filter.after.FromMilliseconds(round(max(after, 0.0) * 1000))
    except ValueError:
        raise ResultNotFoundError(f"{call_id!r} is no id of a task") from None
    handle, pause_s = Handle(call_id, returns), _SHORTEST_S
    async with asyncio.timeout(timeout_s):
        while True:
            if not await _read(stub, request, handle, timeout_s):
                raise ResultNotFoundError(f"no result of {call_id!r} is kept or expected in {queue!r}")
            if handle.done:
                return await handle.result(timeout_s=timeout_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)


async def _read(
    stub: queueing_pb2_grpc.QueueingServiceStub,
    request: pb.ListEventsRequest,
    handle: Handle[R],
    within_s: float,
) -> bool:
    """Take what the log has; whether it has anything."""
    found, asked = False, pb.ListEventsRequest()
    asked.CopyFrom(request)
    while True:
        try:
            answer = await persist(lambda: stub.ListEvents(asked), within_s=within_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        for event in answer.events:
            found = True
            handle.take(dict(event.attributes), event.data)
        if not answer.next_page_token:
            return found
        asked.page_token = answer.next_page_token
