"""What every Registry does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.mesh.registry.domain import Health, Instance
from services.runtime.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.registry.domain import Registry

LEASE_S = 30.0


def instance(number: int = 1, *, service: str = "vectors", port: int = 4000) -> Instance:
    return Instance(
        id=f"{service}-{number}",
        service=service,
        address="127.0.0.1",
        port=port + number,
        version="1.2.3",
        tags=("a",),
        meta={"pid": "7"},
    )


async def _until(watch: AsyncIterator[list[Instance]], ids: list[str]) -> list[Instance]:
    """The first update of a watch that holds exactly these instances."""
    async with asyncio.timeout(10):
        async for instances in watch:
            if [entry.id for entry in instances] == ids:
                return instances
    raise AssertionError("the watch ended")


class RegistryContract:
    """Subclasses give a fixture `registry`: an empty one that takes the services vectors and storage."""

    async def test_a_registered_instance_is_listed_as_given(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=LEASE_S)
        assert await registry.instances("vectors") == [instance()]
        assert await registry.instances() == [instance()]
        assert await registry.instances("search") == []

    async def test_registering_an_id_again_replaces_its_endpoint(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=LEASE_S)
        moved = replace(instance(), port=5555)
        await registry.register(moved, lease_s=LEASE_S)
        assert await registry.instances("vectors") == [moved]

    async def test_deregistering_removes_and_an_unknown_id_is_no_error(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=LEASE_S)
        await registry.deregister("vectors-1")
        await registry.deregister("vectors-1")
        assert await registry.instances() == []

    async def test_an_instance_that_does_not_renew_is_gone_after_its_lease(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=0.2)
        await registry.register(instance(2), lease_s=LEASE_S)
        await _until(registry.watch("vectors"), ["vectors-2"])

    async def test_renewing_an_unknown_lease_is_not_found(self, registry: Registry) -> None:
        with pytest.raises(NotFoundError):
            await registry.keep_alive("vectors-9", Health.SERVING)

    async def test_a_renewal_reports_health(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=LEASE_S)
        await registry.keep_alive("vectors-1", Health.DRAINING)
        (listed,) = await registry.instances("vectors")
        assert listed.health is Health.DRAINING

    async def test_a_watch_tells_the_present_and_each_change(self, registry: Registry) -> None:
        await registry.register(instance(), lease_s=LEASE_S)
        watch = registry.watch("vectors")
        await _until(watch, ["vectors-1"])
        await registry.register(instance(2), lease_s=LEASE_S)
        await _until(registry.watch("vectors"), ["vectors-1", "vectors-2"])
        await registry.deregister("vectors-1")
        await _until(registry.watch("vectors"), ["vectors-2"])
