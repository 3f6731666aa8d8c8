"""Aggregated discovery, state of the world: what each stream has subscribed to, kept up to date."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from prometheus_client import Counter, Gauge

from plexus.xds.v1 import xds_pb2
from services.mesh.snapshot import CLUSTER, LISTENER, PUSH_ORDER, Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "StreamAggregatedResources"
WHOLE = frozenset({LISTENER, CLUSTER})
"""Types whose response is always the complete set of what is subscribed; a missing one counts as deleted."""

ACKS = Counter("plexus_xds_acks_total", "Responses that a client accepted.", ["type"])
NACKS = Counter("plexus_xds_nacks_total", "Responses that a client refused.", ["type"])
STREAMS = Gauge("plexus_xds_streams", "Connected clients.")


class Snapshots:
    """The current snapshot and the news of the next."""

    def __init__(self) -> None:
        self._current = Snapshot()
        self._changed = asyncio.Event()

    @property
    def current(self) -> Snapshot:
        """The newest snapshot."""
        return self._current

    def publish(self, snapshot: Snapshot) -> None:
        """Replace it; equal content is no news."""
        if snapshot.versions == self._current.versions:
            return
        self._current = snapshot
        self._changed.set()
        self._changed = asyncio.Event()

    def changed(self) -> asyncio.Event:
        """The event of the next change."""
        return self._changed


@dataclass(slots=True)
class _Subscription:
    """What one stream wants of one type, and what it was last sent."""

    names: frozenset[str] = frozenset()
    wildcard: bool = False
    nonce: str = ""
    sent: dict[str, bytes] = field(default_factory=dict)
    asked: bool = False  # the next look must answer, changed or not


class _Stream:
    """State of one client."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._subscriptions: dict[str, _Subscription] = {}
        self._nonces = 0
        self.node = ""
        self.wake = asyncio.Event()

    def take(self, request: xds_pb2.DiscoveryRequest) -> None:
        """Note a request: a subscription, an acknowledgement or a refusal."""
        if request.HasField("node"):
            self.node = request.node.id
        if request.type_url not in PUSH_ORDER:
            return
        kind = request.type_url.rpartition(".")[2]
        names = frozenset(request.resource_names)
        subscription = self._subscriptions.get(request.type_url)
        if subscription is None:
            subscription = _Subscription(wildcard=not names and request.type_url in WHOLE)
            self._subscriptions[request.type_url] = subscription
        if not request.response_nonce:
            # First of the stream, after a reconnect with whatever version: answer even if nothing changed.
            subscription.asked = True
        elif request.response_nonce == subscription.nonce:
            if request.HasField("error_detail"):
                NACKS.labels(kind).inc()
                log.error("xds_refused", node=self.node, type=kind, message=request.error_detail.message)
            else:
                ACKS.labels(kind).inc()
        if names - subscription.names:
            subscription.asked = True
        if names != subscription.names or subscription.asked:
            subscription.names = names
            self.wake.set()

    def responses(self) -> list[xds_pb2.DiscoveryResponse]:
        """What has to be sent now, in make-before-break order."""
        snapshot = self._snapshots.current
        answers = (
            self._response(url, self._subscriptions[url], snapshot)
            for url in PUSH_ORDER
            if url in self._subscriptions
        )
        return [answer for answer in answers if answer is not None]

    def _response(
        self, url: str, subscription: _Subscription, snapshot: Snapshot
    ) -> xds_pb2.DiscoveryResponse | None:
        known = snapshot.resources.get(url, {})
        wanted = known if subscription.wildcard else {n: known[n] for n in subscription.names if n in known}
        content = {name: resource.value for name, resource in wanted.items()}
        asked, subscription.asked = subscription.asked, False
        if not asked and content == subscription.sent:
            return None
        if url in WHOLE:
            send = wanted
        else:
            # Only what is new to this client, and never nothing, which some take for a deletion.
            send = {n: r for n, r in wanted.items() if asked or subscription.sent.get(n) != content[n]}
            if not send:
                subscription.sent = content
                return None
        self._nonces += 1
        subscription.nonce = str(self._nonces)
        subscription.sent = content
        return xds_pb2.DiscoveryResponse(
            version_info=snapshot.versions.get(url, ""),
            resources=send.values(),
            type_url=url,
            nonce=subscription.nonce,
        )


async def stream(snapshots: Snapshots, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Serve one client until it goes away."""
    state = _Stream(snapshots)
    STREAMS.inc()

    async def read() -> None:
        async for request in requests:
            state.take(request)

    reader = asyncio.create_task(read(), name="ads-reader")
    reader.add_done_callback(lambda _task: state.wake.set())
    try:
        while not reader.done():
            changed = snapshots.changed()
            state.wake.clear()
            for response in state.responses():
                yield response
            await _either(changed, state.wake)
    finally:
        reader.cancel()
        STREAMS.dec()


async def _either(first: asyncio.Event, second: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in (first, second)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def add_to_server(snapshots: Snapshots, server: grpc.aio.Server) -> None:
    """Serve the official method path with our own messages."""

    async def handle(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        async for response in stream(snapshots, requests):
            yield response

    handler = grpc.stream_stream_rpc_method_handler(
        handle,
        request_deserializer=xds_pb2.DiscoveryRequest.FromString,
        response_serializer=xds_pb2.DiscoveryResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
