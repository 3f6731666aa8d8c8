"""The composition of the vectors service, in a runtime with a real server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc.aio

from plexus.client.channel import Mesh
from plexus.vectors.v1 import vectors_pb2, vectors_pb2_grpc
from services.runtime.config import Settings
from services.runtime.service import ServiceRuntime
from services.vectors.main import SERVICE

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_restarted_service_serves_what_it_was_given(tmp_path: Path) -> None:
    for points in (0, 1):
        async with AsyncExitStack() as stack:
            server = grpc.aio.server()
            mesh = await stack.enter_async_context(Mesh())
            runtime = ServiceRuntime(
                name=SERVICE.name, state_dir=tmp_path, settings=Settings({}), server=server, mesh=mesh
            )
            await SERVICE.compose(runtime, stack)
            stack.push_async_callback(runtime.cancel_loops)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            stub = vectors_pb2_grpc.VectorsServiceStub(channel)
            if not points:
                collection = vectors_pb2.Collection(name="docs", dimension=1)
                await stub.CreateCollection(vectors_pb2.CreateCollectionRequest(collection=collection))
                point = vectors_pb2.Point(id="a", vector=vectors_pb2.Vector(values=[1]))
                await stub.UpsertPoints(vectors_pb2.UpsertPointsRequest(collection="docs", points=[point]))
            counted = await stub.CountPoints(vectors_pb2.CountPointsRequest(collection="docs"))
            assert counted.count == 1
