"""google.pubsub.v1 on the domain: what official clients of Google Pub/Sub call.

The messages are those of the google-cloud-pubsub package. What is not supported is refused with
UNIMPLEMENTED, never taken and ignored.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc
from google.pubsub_v1.types import pubsub as types

from services.queueing.faces.pubsub_access import PACKAGE, SERVICES
from services.queueing.faces.pubsub_publisher import Publisher
from services.queueing.faces.pubsub_subscriber import Subscriber
from services.runtime.errors import UnimplementedError

if TYPE_CHECKING:
    from services.queueing.domain import Broker

# Where the request is not named after its method.
_REQUESTS: dict[str, Any] = {"CreateTopic": types.Topic, "CreateSubscription": types.Subscription}


class Face:
    """Both services, and a third that refuses."""

    def __init__(self, broker: Broker) -> None:
        """Begin to serve.

        Args:
            broker: Where messages are.
        """
        self._stopping = asyncio.Event()
        self._services = {
            "Publisher": Publisher(broker),
            "Subscriber": Subscriber(broker, self._stopping),
        }

    def stop(self) -> None:
        """End streams with a status after which clients open them anew."""
        self._stopping.set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve every method; those without one here are refused in words."""
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    f"{PACKAGE}.{service}", {name: self._handler(service, name) for name in methods}
                )
                for service, methods in SERVICES.items()
            )
        )

    def _handler(self, service: str, name: str) -> grpc.RpcMethodHandler[Any, Any]:
        spelled = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        method = getattr(self._services.get(service), spelled, None)
        if method is None:
            return grpc.unary_unary_rpc_method_handler(_refuse)
        request: Any = _REQUESTS.get(name) or getattr(types, f"{name}Request")
        kind = (
            grpc.stream_stream_rpc_method_handler
            if name == "StreamingPull"
            else grpc.unary_unary_rpc_method_handler
        )
        return kind(method, request_deserializer=request.pb().FromString, response_serializer=_serialize)


async def _refuse(request: bytes, context: Any) -> Any:
    del request, context
    raise UnimplementedError("there are no schemas: messages are not checked", reason="NO_SCHEMAS")


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
