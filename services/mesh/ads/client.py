"""One connected client: what it wants, what it was sent, and what it said to that."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter

from plexus.xds.v1 import xds_pb2
from services.mesh.xds.resources import CLUSTER, LISTENER, PUSH_ORDER, Library

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.mesh.ads.hub import Hub

log = structlog.get_logger(__name__)

WHOLE = frozenset({LISTENER, CLUSTER})
"""Types whose response is always the complete set of what is subscribed; a missing one counts as deleted."""
MAX_NAMES = 20_000
"""Resources of one type that a client may ask for; the rest is ignored."""
_MAX_PENDING = 16
"""Unanswered responses of a type that are remembered; a client that answers none of them is beyond help."""

ACKS = Counter("plexus_xds_acks_total", "Responses that a client accepted.", ["type"])
NACKS = Counter("plexus_xds_nacks_total", "Responses that a client refused.", ["type"])
RESPONSES = Counter("plexus_xds_responses_total", "Responses sent.", ["type"])
RESPONSE_BYTES = Counter("plexus_xds_response_bytes_total", "Bytes of the responses sent.", ["type"])


class _Counts:
    """The counters of one type; finding one by its label at each response costs more than counting."""

    def __init__(self, url: str) -> None:
        kind = url.rpartition(".")[2]
        self.acks = ACKS.labels(kind)
        self.nacks = NACKS.labels(kind)
        self.responses = RESPONSES.labels(kind)
        self.sent_bytes = RESPONSE_BYTES.labels(kind)


_COUNTS = {url: _Counts(url) for url in PUSH_ORDER}


@dataclass(frozen=True, slots=True)
class Response:
    """An encoded DiscoveryResponse."""

    data: bytes

    # What the interceptor of our servers looks at.
    DESCRIPTOR = xds_pb2.DiscoveryResponse.DESCRIPTOR


@dataclass(slots=True)
class Refusal:
    """A response that the client did not accept.

    Attributes:
        text: The client's words.
        versions: The refused form of each resource that was in the response; which of them was at fault, only
            the text says.
        time: Seconds since the epoch.
    """

    text: str
    versions: dict[str, str]
    time: float


@dataclass(frozen=True, slots=True)
class _Sent:
    """A response that was sent: the versions in it, and the revision of the hub that it was made of."""

    versions: dict[str, str]
    revision: int


@dataclass(slots=True)
class Subscription:
    """What a client wants of one type, and how far it is.

    Attributes:
        names: What it asked for.
        wildcard: It wants everything.
        dirty: Names whose resource may be another than the client has.
        asked: The next look must answer, changed or not.
        sent: Version of each resource that the client was sent last.
        acked: Version of each resource that the client accepted last.
        pending: Responses without an answer yet, by nonce.
        accepted: The hub's revision that the last accepted response was made of.
        refusal: The last response that it refused, until it accepts one.
    """

    names: frozenset[str] = frozenset()
    wildcard: bool = False
    dirty: set[str] = field(default_factory=set)
    asked: bool = False
    sent: dict[str, str] = field(default_factory=dict)
    acked: dict[str, str] = field(default_factory=dict)
    pending: dict[str, _Sent] = field(default_factory=dict)
    accepted: int = 0
    refusal: Refusal | None = None


class Client:
    """State of one stream."""

    def __init__(self, hub: Hub, peer: str) -> None:
        self._hub = hub
        self._nonces = 0
        self.subscriptions: dict[str, Subscription] = {}
        self.peer = peer
        self.node = ""
        self.zone = ""
        self.library = ""
        self.runs_on: Library | None = None
        self.connected = time.time()
        self.wake = asyncio.Event()

    def take(self, request: xds_pb2.DiscoveryRequest) -> None:
        """Note a request: a subscription, an acknowledgement or a refusal."""
        if request.HasField("node") and not self.node:
            self.node = request.node.id
            self.zone = request.node.locality.zone
            self.library = request.node.user_agent_name
            self.runs_on = Library.of(self.library)
        url = request.type_url
        if url not in PUSH_ORDER:
            return
        subscription = self.subscriptions.get(url)
        if subscription is None:
            subscription = self.subscriptions[url] = Subscription()
            if not request.resource_names and url in WHOLE:
                subscription.wildcard = True
                self._hub.follow_all(self, url)
        if not request.response_nonce:
            # First of the stream, after a reconnect with whatever version: answer even if nothing changed.
            subscription.asked = True
        else:
            self._answer(url, subscription, request)
        self._subscribe(url, subscription, request.resource_names)
        if subscription.asked or subscription.dirty:
            self.wake.set()

    def _answer(self, url: str, subscription: Subscription, request: xds_pb2.DiscoveryRequest) -> None:
        sent = subscription.pending.pop(request.response_nonce, None)
        if sent is None:
            return  # of another stream, or one that was answered already
        versions = sent.versions
        if request.HasField("error_detail"):
            _COUNTS[url].nacks.inc()
            kind = url.rpartition(".")[2]
            text = request.error_detail.message
            subscription.refusal = Refusal(text, versions, time.time())
            log.error("xds_refused", node=self.node, peer=self.peer, type=kind, message=text)
            return
        _COUNTS[url].acks.inc()
        subscription.accepted = max(subscription.accepted, sent.revision)
        subscription.acked.update(
            (name, version) for name, version in versions.items() if name in subscription.sent
        )
        if subscription.refusal is not None and subscription.refusal.versions.keys() <= versions.keys():
            subscription.refusal = None

    def _subscribe(self, url: str, subscription: Subscription, asked: Iterable[str]) -> None:
        if subscription.wildcard:
            return
        names = frozenset(asked)
        if len(names) > MAX_NAMES:
            log.error("too_many_names", node=self.node, names=len(names))
            names = frozenset(sorted(names)[:MAX_NAMES])
        if names == subscription.names:
            return
        before, subscription.names = subscription.names, names
        for name in before - names:
            self._hub.unfollow(self, url, name)
            subscription.dirty.discard(name)
            subscription.sent.pop(name, None)
            subscription.acked.pop(name, None)
        for name in names - before:
            self._hub.follow(self, url, name)
            subscription.dirty.add(name)
            subscription.asked = True  # a new name is answered at once even if others wait for an answer

    def changed(self, url: str, name: str) -> None:
        """Note that a resource that it follows is another now."""
        self.subscriptions[url].dirty.add(name)
        self.wake.set()

    def has_accepted(self, url: str, revision: int) -> bool:
        """Whether of a type it has nothing any more that is older than a revision of the hub."""
        subscription = self.subscriptions.get(url)
        if subscription is None or subscription.accepted >= revision:
            return True
        # Each response holds all that had changed by then, so with none outstanding it has everything.
        outstanding = subscription.asked or subscription.dirty or subscription.pending
        return not outstanding and subscription.refusal is None

    def leave(self) -> None:
        """Forget the stream."""
        for url, subscription in self.subscriptions.items():
            for name in subscription.names:
                self._hub.unfollow(self, url, name)

    def responses(self) -> list[Response]:
        """What has to be sent now, in make-before-break order; at most one of each type."""
        found = []
        for url in PUSH_ORDER:
            subscription = self.subscriptions.get(url)
            if subscription is not None and (subscription.asked or subscription.dirty):
                response = self._response(url, subscription)
                if response is not None:
                    found.append(response)
        return found

    def _response(self, url: str, subscription: Subscription) -> Response | None:
        if subscription.pending and not subscription.asked:
            # One unanswered response at a time: a slow client then gets the newest state and not every state.
            return None
        asked, subscription.asked = subscription.asked, False
        first = not subscription.sent
        dirty, subscription.dirty = subscription.dirty, set()
        if url in WHOLE:
            names: Iterable[str] = self._hub.names(url) if subscription.wildcard else subscription.names
        else:
            names = subscription.names if asked and first else dirty
        forms = {
            name: resource.seen_from(self.zone, self.runs_on)
            for name in sorted(names)
            if (resource := self._hub.get(url, name)) is not None
        }
        versions = {name: form.version for name, form in forms.items()}
        if url in WHOLE:
            if not asked and versions == subscription.sent:
                return None
        else:
            if not asked:
                versions = {n: v for n, v in versions.items() if subscription.sent.get(n) != v}
            if not versions:
                return None  # never nothing, which some take for a deletion
        self._nonces += 1
        nonce = str(self._nonces)
        subscription.sent.update(versions)
        subscription.pending[nonce] = _Sent(versions, self._hub.revision)
        while len(subscription.pending) > _MAX_PENDING:
            del subscription.pending[next(iter(subscription.pending))]
        head = xds_pb2.DiscoveryResponse(version_info=str(self._hub.revision), type_url=url, nonce=nonce)
        data = b"".join((head.SerializeToString(), *(forms[name].frame for name in versions)))
        counts = _COUNTS[url]
        counts.responses.inc()
        counts.sent_bytes.inc(len(data))
        return Response(data)
