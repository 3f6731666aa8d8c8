"""The end of an instance: it stops when nobody calls it any more, not a guessed while after it said so.

A server that stops refuses the calls that are on their way to it, and a caller cannot tell whether such a
call was begun. So who leaves waits, bounded, until every control plane has seen it go and every client that
follows the service has accepted endpoints without it.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import grpc.aio
import structlog
from google.protobuf import duration_pb2

from plexus.mesh.v1 import mesh_pb2, mesh_pb2_grpc
from services.mesh.direct import CONTROL, control_channel
from services.mesh.registry.domain import Health
from services.mesh.xds.resources import ENDPOINT
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from services.mesh.ads.client import Client
    from services.mesh.ads.hub import Hub
    from services.mesh.plane import Plane
    from services.mesh.registry.domain import Instance, Registry
    from services.mesh.trust.domain import Identity

log = structlog.get_logger(__name__)

PATIENCE_S, MAX_PATIENCE_S = 4.0, 60.0
_LOOK_S = 0.005
"""An acknowledgement costs nothing this way, and there are many more of them than departures."""
_CALL_S = 2.0
"""On top of the patience, for the way there and back."""


class Departure(NamedTuple):
    """How a wait ended.

    Attributes:
        still_serving: The catalogue has the instance serving.
        behind: Nodes that have not accepted its absence.
    """

    still_serving: bool
    behind: list[str]


async def awaited(hub: Hub, plane: Plane, service: str, instance_id: str, patience_s: float) -> Departure:
    """Wait until no client of this control plane takes an instance for one that serves.

    Args:
        hub: Who is told what.
        plane: What the catalogue says.
        service: The instance's.
        instance_id: Its id.
        patience_s: The bound.
    """
    end = time.monotonic() + patience_s
    while _serves(plane, service, instance_id):
        if time.monotonic() >= end:
            return Departure(still_serving=True, behind=[])
        await asyncio.sleep(_LOOK_S)
    revision = hub.revision
    waiting = hub.followers_of(service)
    while waiting := [client for client in waiting if _behind(hub, client, revision)]:
        if time.monotonic() >= end:
            break
        await asyncio.sleep(_LOOK_S)
    return Departure(still_serving=False, behind=sorted(client.node for client in waiting))


def _serves(plane: Plane, service: str, instance_id: str) -> bool:
    return any(
        known.id == instance_id and known.health is Health.SERVING for known in plane.instances(service)
    )


def _behind(hub: Hub, client: Client, revision: int) -> bool:
    return client in hub.clients and not client.has_accepted(ENDPOINT, revision)


async def departed(
    registry: Registry, instance: Instance, identity: Identity, *, patience_s: float = PATIENCE_S
) -> bool:
    """Wait until no client of any control plane calls an instance that has said that it drains.

    Args:
        registry: Knows the control planes: each has clients of its own.
        instance: Who leaves.
        identity: Its certificate.
        patience_s: The bound.

    Returns:
        Whether all have accepted its absence; False as well if a control plane did not answer.
    """
    try:
        async with asyncio.timeout(_CALL_S):
            controls = await registry.instances(CONTROL)
    except (PlexusError, TimeoutError) as error:
        log.warning("departure_not_awaited", reason=getattr(error, "reason", "TIMEOUT"))
        return False
    told = await asyncio.gather(*(_ask(each, instance, identity, patience_s) for each in controls))
    return bool(told) and all(told)


async def _ask(control: Instance, instance: Instance, identity: Identity, patience_s: float) -> bool:
    patience = duration_pb2.Duration()
    patience.FromTimedelta(timedelta(seconds=patience_s))
    request = mesh_pb2.AwaitDepartureRequest(
        service=instance.service, instance_id=instance.id, patience=patience
    )
    async with control_channel(control.address, control.port, identity) as channel:
        try:
            answer = await mesh_pb2_grpc.MeshServiceStub(channel).AwaitDeparture(
                request, timeout=patience_s + _CALL_S
            )
        except grpc.aio.AioRpcError as error:
            log.warning("departure_not_awaited", control=control.id, code=error.code().name)
            return False
    if answer.still_serving or answer.behind:
        log.warning("departed_early", still_serving=answer.still_serving, behind=list(answer.behind))
        return False
    return True
