"""What a service's own servers are told of its policy."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio
import structlog

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from plexus.client.channel import MeshChannel

log = structlog.get_logger(__name__)

_RETRY_MIN_S, _RETRY_MAX_S = 0.1, 10.0


async def follow_retry_budget(
    channel: grpc.aio.Channel | MeshChannel, service: str, apply: Callable[[float, float], None]
) -> None:
    """Apply the retry budget of a service's policy, for ever; without a control plane the last one holds.

    Args:
        channel: To the control plane.
        service: Whose.
        apply: Called with percent and retries a second.
    """
    stub = mesh_pb2_grpc.MeshServiceStub(cast("grpc.aio.Channel", channel))
    failures = 0
    while True:
        try:
            async for told in stub.WatchServerPolicy(mesh_pb2.WatchServerPolicyRequest(service=service)):
                failures = 0
                apply(told.retry_budget_percent, told.retry_budget_min_per_second)
        except grpc.aio.AioRpcError as error:
            failures += 1
            if failures == 1 and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                log.info("policy_watch_ended", reason=error.code().name)
        pause = min(_RETRY_MAX_S, _RETRY_MIN_S * 2 ** min(failures, 10))
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
