"""Channels of the mesh: `xds:///<service>` with a deadline, request id and trace context on every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc
import grpc.aio
import grpc.experimental

from plexus.client.propagation import call_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

StubT = TypeVar("StubT")

UNARY_TIMEOUT_S = 30.0
"""Deadline of a unary call when neither the call nor the caller's own deadline gives one."""
STREAM_TIMEOUT_S = 3600.0
"""The same for calls that stream."""
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message taken or sent; equal to the servers' default."""
KEEPALIVE_S = 20.0
"""How long a connection with calls is silent before it is asked for a sign of life. Servers of Plexus let a
client ask every 10 s, as `server.min_ping_interval_s` says."""
KEEPALIVE_TIMEOUT_S = 10.0
"""How long it has for the answer. Then the connection is closed, and its calls end with UNAVAILABLE."""
_HANDOVER_SHARE = 0.95  # a callee gives up before its caller does, so that the caller can still say why


def keepalive(
    interval_s: float = KEEPALIVE_S, timeout_s: float = KEEPALIVE_TIMEOUT_S
) -> list[tuple[str, int]]:
    """Arguments of a channel that notices a peer which hangs: TCP alone does not, its kernel answers for it.

    A gRPC server closes a connection that asks more often than it allows, by default every five minutes, so
    they are for servers that are known to allow it.
    """
    return [
        ("grpc.keepalive_time_ms", round(interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(timeout_s * 1000)),  # what counts; a minute if it is not given
        ("grpc.http2.max_pings_without_data", 0),  # as long as a call waits, however silent it is
    ]


def _timeout(asked: float | None, default: float) -> float:
    context = call_context.get()
    remaining = None if context is None else context.remaining_s()
    if remaining is None:
        return default if asked is None else asked
    budget = remaining * _HANDOVER_SHARE
    return budget if asked is None else min(asked, budget)


def _metadata(given: Sequence[tuple[str, str | bytes]] | None) -> list[tuple[str, str | bytes]] | None:
    context = call_context.get()
    if context is None:
        return list(given) if given else None
    metadata = list(given or ())
    if context.request_id:
        metadata.append(("x-request-id", context.request_id))
    if context.traceparent:
        metadata.append(("traceparent", context.traceparent))
    return metadata


class MeshChannel:
    """The part of grpc.aio.Channel that generated stubs use, with deadlines and context on each call.

    A wrapper instead of client interceptors: those cost a task and two awaits a call.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        headers: Sequence[tuple[str, str]] = (),
        *,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> None:
        self._channel = channel
        self._headers = list(headers)
        self._timeout_s = timeout_s

    def _wrap(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], default: float
    ) -> Callable[..., Any]:
        kind, path = method, args[0]
        inner = getattr(self._channel, kind)(path, *args[1:], **kwargs)
        headers = self._headers

        def call(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Sequence[tuple[str, str | bytes]] | None = None,
            wait_for_ready: bool | None = None,
        ) -> Any:
            given = [*headers, *(metadata or ())] if headers else metadata
            options = {
                "timeout": _timeout(timeout, default),
                "metadata": _metadata(given),
                "wait_for_ready": wait_for_ready,
            }
            return inner(request, **options)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel.unary_unary."""
        return self._wrap("unary_unary", args, kwargs, self._timeout_s)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel.unary_stream."""
        return self._wrap("unary_stream", args, kwargs, STREAM_TIMEOUT_S)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel.stream_unary."""
        return self._wrap("stream_unary", args, kwargs, STREAM_TIMEOUT_S)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel.stream_stream."""
        return self._wrap("stream_stream", args, kwargs, STREAM_TIMEOUT_S)


def service_of(stub: type[object]) -> str:
    """The mesh name of a stub's service: plexus.vectors.v1.vectors_pb2_grpc gives `vectors`."""
    parts = stub.__module__.split(".")
    if len(parts) < 2 or parts[0] != "plexus":  # noqa: PLR2004 - plexus.<service>
        raise ValueError(f"{stub.__module__}.{stub.__qualname__} is not a stub of a Plexus service")
    return parts[1]


class Mesh:
    """Stubs for every service, found through xDS: `mesh.stub(vectors_pb2_grpc.VectorsServiceStub)`.

    The process's xDS bootstrap (GRPC_XDS_BOOTSTRAP) must be set before the first channel is made: gRPC reads
    it once; `plexus.client.connect` sees to that for programs. One channel a service is opened at first use
    and kept.

    Args:
        timeout_s: Deadline of a unary call, in seconds, when neither the call nor its caller's own deadline
            gives one.
    """

    def __init__(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self, service: str) -> MeshChannel:
        """The channel of a service, of anybody's."""
        return self._open(service, [])

    def _open(self, service: str, options: list[tuple[str, int]]) -> MeshChannel:
        channel = self._channels.get(service)
        if channel is None:
            # Without TLS from the control plane the fallback must fail rather than talk plaintext.
            credentials = grpc.xds_channel_credentials(grpc.ssl_channel_credentials())
            channel = grpc.aio.secure_channel(
                f"xds:///{service}",
                credentials,
                options=[
                    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                    *options,
                ],
            )
            self._channels[service] = channel
        return MeshChannel(channel, timeout_s=self._timeout_s)

    def stub(self, stub: Callable[[grpc.aio.Channel], StubT]) -> StubT:
        """An instance of a generated async stub, dialling its service by name."""
        service = service_of(cast("type[object]", stub))
        return stub(cast("grpc.aio.Channel", self._open(service, keepalive())))

    async def close(self) -> None:
        """Close all channels; calls in progress are cancelled."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()
