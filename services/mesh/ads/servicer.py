"""The official method path over our own messages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from plexus.xds.v1 import xds_pb2
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.ads.client import Response
    from services.mesh.ads.hub import Hub

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "StreamAggregatedResources"


async def stream(hub: Hub, requests: AsyncIterator[Any], peer: str) -> AsyncIterator[Response]:
    """Serve one client until it goes away."""
    client = hub.connect(peer)

    async def read() -> None:
        async for request in requests:
            client.take(request)

    reader = asyncio.create_task(read(), name="ads-reader")
    reader.add_done_callback(lambda _task: client.wake.set())
    try:
        while not reader.done():
            client.wake.clear()
            for response in client.responses():
                yield response
            await client.wake.wait()
    finally:
        hub.disconnect(client)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def add_to_server(hub: Hub, server: grpc.aio.Server) -> None:
    """Serve a hub's resources."""

    async def handle(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Response]:
        async for response in stream(hub, requests, current().peer):
            yield response

    handler: Any = grpc.stream_stream_rpc_method_handler(
        handle,
        request_deserializer=xds_pb2.DiscoveryRequest.FromString,
        response_serializer=lambda response: response.data,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
