"""The first content of a Consul: the intentions and policies that Plexus ships."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import structlog

from services.mesh.consul.intentions import PROTOCOL
from services.mesh.consul.kv import KeyValues
from services.mesh.intentions import WILDCARD
from services.runtime.errors import PermissionDeniedError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from services.mesh.consul.client import ConsulClient
    from services.mesh.intentions import ServiceIntentions

log = structlog.get_logger(__name__)

SEEDED = "plexus/seeded"
"""Key that says that what Plexus ships was once written; what an operator did since is not undone."""
_RETRY_MAX_S = 10.0


async def seed(
    client: ConsulClient, entries: Iterable[ServiceIntentions], values: Mapping[str, bytes] | None = None
) -> None:
    """Write what Consul does not have, once in Consul's life, and again after it lost its data.

    Args:
        client: An open client.
        entries: Intentions.
        values: Of keys.

    Runs for ever. Without the right to write, which is an operator's, it says so and waits for the operator.
    """
    written = list(entries)
    while True:
        # A watch of its own each time: its first answer tells what is there, however quickly that changed.
        async for keys in KeyValues(client).watch(SEEDED):
            if SEEDED not in keys and await _written(client, written, values or {}):
                break


async def _written(
    client: ConsulClient, entries: list[ServiceIntentions], values: Mapping[str, bytes]
) -> bool:
    """Write, again and again while Consul is away; False without the right to."""
    failures = 0
    while True:
        try:
            await _write(client, entries, values)
        except PlexusError as error:
            failures += 1
            if failures == 1:
                log.warning("consul_not_seeded", reason=error.reason)
            if isinstance(error, PermissionDeniedError):
                return False
            await asyncio.sleep(min(_RETRY_MAX_S, 2**failures) * random.uniform(0.5, 1.0))  # noqa: S311 - spreads
            continue
        log.info("consul_seeded", intentions=len(entries), values=len(values))
        return True


async def _write(
    client: ConsulClient, entries: Iterable[ServiceIntentions], values: Mapping[str, bytes]
) -> None:
    for entry in entries:
        if entry.Name != WILDCARD:  # which is no service
            await client.api.config.set("service-defaults", entry.Name, {"Protocol": PROTOCOL}, cas=0)
        body = entry.model_dump(exclude_none=True, exclude_defaults=True)
        await client.api.config.set(entry.Kind, entry.Name, {"Sources": body["Sources"]}, cas=0)
    for key, value in values.items():
        await KeyValues(client).put(key, value, cas=0)
    await KeyValues(client).put(SEEDED, b"1", cas=0)
