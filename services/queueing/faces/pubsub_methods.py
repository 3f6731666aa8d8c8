"""The methods of google.pubsub.v1 by their paths, each from bytes to bytes."""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from google.pubsub_v1.types import pubsub as types

from services.queueing.faces.pubsub_access import PACKAGE
from services.queueing.faces.pubsub_publisher import Publisher
from services.queueing.faces.pubsub_subscriber import Subscriber
from services.runtime.decoding import decoded, decoding
from services.runtime.errors import UnimplementedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from services.queueing.domain import Broker

# Where the request is not named after its method.
_REQUESTS: dict[str, Any] = {"CreateTopic": types.Topic, "CreateSubscription": types.Subscription}


class Methods:
    """Both services, and a third that refuses."""

    def __init__(self, broker: Broker, stopping: asyncio.Event, max_bytes: int) -> None:
        """Begin to serve.

        Args:
            broker: Where messages are.
            stopping: Set when the server stops.
            max_bytes: Of a request.
        """
        self._subscriber = Subscriber(broker, stopping)
        self._services = {"Publisher": Publisher(broker), "Subscriber": self._subscriber}
        self._max_bytes = max_bytes

    async def call(self, path: str, request: bytes, context: Any) -> bytes:
        """Answer a request.

        Raises:
            PlexusError: What the method raises; UnimplementedError if there is none.
        """
        service, _, name = path.removeprefix(f"/{PACKAGE}.").partition("/")
        method = getattr(self._services.get(service), re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), None)
        if method is None:
            raise UnimplementedError("there are no schemas: messages are not checked", reason="NO_SCHEMAS")
        kind = _REQUESTS.get(name) or getattr(types, f"{name}Request")
        return _serialize(await method(decoded(self._decode(kind)(request)), context))

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes]:
        """Answer a StreamingPull."""
        decode = self._decode(types.StreamingPullRequest)

        async def read() -> AsyncIterator[Any]:
            async for request in requests:
                yield decoded(decode(request))

        async with aclosing(self._subscriber.streaming_pull(read(), context)) as responses:
            async for response in responses:
                yield _serialize(response)

    def _decode(self, kind: Any) -> Callable[[bytes], Any]:
        decode = decoding(kind.pb().FromString, self._max_bytes)
        assert decode is not None  # noqa: S101 - only without a deserializer
        return decode


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
