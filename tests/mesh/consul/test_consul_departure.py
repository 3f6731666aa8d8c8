"""An instance in maintenance is waited for at every control plane that follows a real Consul."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from services.mesh.departure import departed
from services.mesh.main import follow_catalogue
from services.mesh.registry.consul import ConsulRegistry
from services.mesh.registry.domain import Health
from services.mesh.trust.local import LocalCertificateSource
from services.mesh.xds.resources import ENDPOINT
from tests.mesh.test_ads import request
from tests.mesh.test_departure import LONG_S, ONE, TWO, Replica, follower

if TYPE_CHECKING:
    from pathlib import Path

    from services.mesh.consul.client import ConsulClient

WITHIN_S = 90.0


async def has(replica: Replica, health: Health) -> None:
    """Wait until a control plane has the first instance in a health."""
    async with asyncio.timeout(WITHIN_S):
        while [each.health for each in replica.world.plane.instances("vectors")] != [health, Health.SERVING]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_the_clients_of_both_control_planes_let_go_before_it_returns(
    client: ConsulClient, tmp_path: Path
) -> None:
    registry = ConsulRegistry(client)
    identity = LocalCertificateSource(tmp_path, "vectors", 3600).ensure()
    async with AsyncExitStack() as stack:
        replicas = [Replica(tmp_path, number) for number in (1, 2)]
        for each in replicas:
            await each.server.start()
            stack.push_async_callback(each.server.stop, 0)
            await registry.register(each.instance, lease_s=600)
        for instance in (ONE, TWO):
            await registry.register(instance, lease_s=600)
        following = [asyncio.create_task(follow_catalogue(registry, each.world.plane)) for each in replicas]
        stack.callback(lambda: [task.cancel() for task in following])
        for each in replicas:
            await has(each, Health.SERVING)
        streams = [follower(each.world) for each in replicas]
        await registry.keep_alive(ONE.id, Health.DRAINING)
        leaving = asyncio.create_task(departed(registry, ONE, identity, patience_s=LONG_S / 2))
        for each, stream in zip(replicas, streams, strict=True):
            await has(each, Health.DRAINING)
            (response,) = stream.look()
            assert not (await asyncio.wait([leaving], timeout=0.1))[0]
            stream.ask(request(ENDPOINT, "vectors", nonce=response.nonce))
        assert await leaving
