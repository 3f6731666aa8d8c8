"""google.pubsub.v1 on the domain: what official clients of Google Pub/Sub call.

The messages are those of the google-cloud-pubsub package, which takes a second and 30 MiB to import: that
waits for the first call. What is not supported is refused with UNIMPLEMENTED, never taken and ignored.
"""

from __future__ import annotations

import asyncio
import importlib
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from services.queueing.faces.pubsub_access import GROUPS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.queueing.domain import Broker
    from services.queueing.faces.pubsub_methods import Methods


class Face(grpc.GenericRpcHandler):
    """Answers for every method of the package; add it to a server with `add_generic_rpc_handlers`."""

    def __init__(self, broker: Broker, stopping: asyncio.Event, *, max_bytes: int) -> None:
        """Begin to serve.

        Args:
            broker: Where messages are.
            stopping: Set when the server stops: streams then end with a status after which clients open them
                anew.
            max_bytes: Of a request.
        """
        self._broker = broker
        self._stopping = stopping
        self._max_bytes = max_bytes
        self._loading: asyncio.Task[Methods] | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method, if it is of this package."""
        path = handler_call_details.method
        if path not in GROUPS:
            return None
        if path.endswith("/StreamingPull"):
            return grpc.stream_stream_rpc_method_handler(self._stream, request_deserializer=bytes)

        async def call(request: bytes, context: Any) -> bytes:
            return await (await self._methods()).call(path, request, context)

        return grpc.unary_unary_rpc_method_handler(call, request_deserializer=bytes)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        methods = await self._methods()
        async with aclosing(methods.stream(requests, context)) as responses:
            async for response in responses:
                yield response

    async def _methods(self) -> Methods:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        # Shielded: the first caller may go away, the others wait for the same.
        return await asyncio.shield(self._loading)

    async def _load(self) -> Methods:
        module = await asyncio.to_thread(importlib.import_module, "services.queueing.faces.pubsub_methods")
        methods: Methods = module.Methods(self._broker, self._stopping, self._max_bytes)
        return methods
