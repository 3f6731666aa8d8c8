"""The local registry, directly and over gRPC."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from plexus.registry.v1 import registry_pb2_grpc
from services.mesh.registry.client import Registration, RemoteRegistry
from services.mesh.registry.domain import Health, Instance
from services.mesh.registry.local import LocalRegistry
from services.mesh.registry.servicer import RegistryServicer
from services.runtime.errors import InvalidArgumentError, PermissionDeniedError
from tests.contracts.registry import LEASE_S, RegistryContract, instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.mesh.registry.domain import Registry
    from tests.conftest import Serve


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalRegistry]:
    async with LocalRegistry(tmp_path / "catalogue.json") as registry:
        yield registry


class TestLocalRegistry(RegistryContract):
    @pytest.fixture
    def registry(self, local: LocalRegistry) -> Registry:
        return local


class TestRemoteRegistry(RegistryContract):
    @pytest.fixture
    async def registry(self, local: LocalRegistry, serve: Serve) -> AsyncIterator[Registry]:
        servicer = RegistryServicer(local)
        async with serve(
            lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server),
            peer="vectors",
        ) as channel:
            yield RemoteRegistry(channel)

    async def test_a_service_cannot_register_another(self, registry: Registry) -> None:
        with pytest.raises(PermissionDeniedError):
            await registry.register(instance(service="storage"), lease_s=LEASE_S)

    async def test_a_service_cannot_touch_what_another_registered(
        self, registry: Registry, local: LocalRegistry
    ) -> None:
        foreign = instance(service="storage")
        await local.register(foreign, lease_s=LEASE_S)
        with pytest.raises(PermissionDeniedError):
            await registry.register(replace(instance(), id=foreign.id), lease_s=LEASE_S)
        with pytest.raises(PermissionDeniedError):
            await registry.keep_alive(foreign.id, Health.NOT_SERVING)
        with pytest.raises(PermissionDeniedError):
            await registry.deregister(foreign.id)
        assert await registry.instances() == [foreign]


async def test_a_restarted_registry_still_knows_everyone_for_a_lease(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.json"
    async with LocalRegistry(file) as registry:
        await registry.register(instance(), lease_s=LEASE_S)
        await registry.register(instance(2), lease_s=0.2)
    async with LocalRegistry(file) as registry:
        assert await registry.instances() == [instance(), instance(2)]
        async with asyncio.timeout(10):
            async for now in registry.watch():
                if now == [instance()]:
                    break


async def test_a_short_lease_ends_on_time_beside_a_long_one(local: LocalRegistry) -> None:
    await local.register(instance(1), lease_s=LEASE_S)
    for _ in range(5):
        await asyncio.sleep(0)  # lets the expiry begin its wait for the long one
    await local.register(instance(2), lease_s=0.2)
    async with asyncio.timeout(5):
        async for now in local.watch():
            if now == [instance(1)]:
                break


async def test_a_control_plane_that_was_stopped_expires_nobody_when_it_goes_on(
    local: LocalRegistry,
) -> None:
    await local.register(instance(1), lease_s=LEASE_S)
    long_ago = time.monotonic() - 60
    local._expiry["vectors-1"] = local._next_end = long_ago
    local._end_leases()
    assert await local.instances() == [instance(1)]
    local._expiry["vectors-1"] = local._next_end = time.monotonic() - 0.1
    local._end_leases()
    assert await local.instances() == []


async def test_a_catalogue_that_cannot_be_written_does_not_stop_the_registry(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    async with LocalRegistry(folder / "catalogue.json") as registry:
        folder.rmdir()
        await registry.register(instance(), lease_s=LEASE_S)
        assert await registry.instances() == [instance()]


async def test_a_damaged_catalogue_does_not_stop_the_start(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.json"
    file.write_text('{"instances": [{"id": 3')
    async with LocalRegistry(file) as registry:
        assert await registry.instances() == []


async def test_a_registration_comes_back_after_the_registry_forgot_it(local: LocalRegistry) -> None:
    registration = Registration(local, instance(), lease_s=0.3)
    task = asyncio.create_task(registration.run())
    try:
        await asyncio.wait_for(registration.registered.wait(), 5)
        await local.deregister("vectors-1")
        async with asyncio.timeout(5):
            async for now in local.watch("vectors"):
                if now:
                    break
    finally:
        task.cancel()


@pytest.mark.parametrize(
    ("field", "value"),
    [("service", "Not A Label"), ("address", "example.org"), ("port", 70000), ("weight", 0), ("id", "")],
)
def test_a_malformed_instance_names_its_field(field: str, value: object) -> None:
    good = {"id": "a-1", "service": "a", "address": "127.0.0.1", "port": 1}
    with pytest.raises(InvalidArgumentError) as caught:
        Instance(**{**good, field: value})  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.violations[0].field == f"instance.{field}"
