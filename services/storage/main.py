"""Composition of the storage service."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from plexus.storage.v1 import storage_pb2_grpc
from services.runtime.errors import AlreadyExistsError
from services.runtime.service import Service
from services.storage.backends.local import LocalObjectStore
from services.storage.config import StorageConfig
from services.storage.servicer import StorageServicer

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the store, make the default buckets, serve."""
    config = runtime.config(StorageConfig)
    store = await stack.enter_async_context(
        LocalObjectStore(runtime.data_dir, max_object_bytes=config.max_object_bytes)
    )
    for bucket in config.default_buckets:
        with contextlib.suppress(AlreadyExistsError):  # every start but the first
            await store.create_bucket(bucket)
    storage_pb2_grpc.add_StorageServiceServicer_to_server(StorageServicer(store), runtime.server)


SERVICE = Service(name="storage", compose=compose, proto_services=("plexus.storage.v1.StorageService",))
