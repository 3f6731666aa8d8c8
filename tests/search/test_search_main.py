"""The composition of the search service, in a runtime with a real server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc.aio

from plexus.client.channel import Mesh
from plexus.search.v1 import search_pb2, search_pb2_grpc
from services.runtime.config import Settings
from services.runtime.service import ServiceRuntime
from services.search.main import SERVICE

if TYPE_CHECKING:
    from pathlib import Path


async def test_the_default_indexes_exist_after_every_start_and_keep_their_documents(tmp_path: Path) -> None:
    for start in range(2):
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
            stub = search_pb2_grpc.SearchServiceStub(channel)
            document = search_pb2.Document(id=str(start))
            await stub.IndexDocuments(search_pb2.IndexDocumentsRequest(index="logs", documents=[document]))
            listed = await stub.ListIndexes(search_pb2.ListIndexesRequest())
            counts = {index.name: index.document_count for index in listed.indexes}
            assert counts == {"executions": 0, "logs": start + 1, "workflows": 0}
