"""All resources, and who follows which: the cost of a change is that of the clients that follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Gauge

from services.mesh.ads.client import Client
from services.mesh.xds.resources import ENDPOINT, PUSH_ORDER, service_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from services.mesh.xds.resources import Key, Resource

STREAMS = Gauge("plexus_xds_streams", "Connected clients.")
RESOURCES = Gauge("plexus_xds_resources", "Resources that can be subscribed to.")


class Hub:
    """The present resources and the connected clients.

    Attributes:
        clients: Who is connected.
        revision: Grows with each change.
        unknown: Told the service of a resource that a client asks for and that does not exist, so that it can
            be published at once; otherwise the client would wait for it for seconds.
    """

    def __init__(self) -> None:
        self._resources: dict[Key, Resource] = {}
        self._names: dict[str, set[str]] = {url: set() for url in PUSH_ORDER}
        self._followers: dict[Key, set[Client]] = {}
        self._followers_of_all: dict[str, set[Client]] = {}
        self._removed: set[Key] = set()
        self.unknown: Callable[[str], None] | None = None
        self.clients: set[Client] = set()
        self.revision = 0

    def get(self, url: str, name: str) -> Resource | None:
        """A resource."""
        return self._resources.get((url, name))

    def names(self, url: str) -> Iterable[str]:
        """All of a type."""
        return self._names[url]

    def publish(self, resources: Mapping[Key, Resource], removed: Iterable[Key] = ()) -> set[Key]:
        """Replace resources and take others away.

        What is taken away stays for as long as a client follows it: a deletion would fail the calls that are
        on their way to what replaces it.

        Returns:
            The resources that are another now.
        """
        changed = {
            key for key, resource in resources.items() if not resource.same_as(self._resources.get(key))
        }
        if changed:
            self.revision += 1
        for key in changed:
            self._resources[key] = resources[key]
            self._names[key[0]].add(key[1])
        self._removed.difference_update(resources)
        for key in changed:
            for client in self._followers.get(key, ()):
                client.changed(*key)
            for client in self._followers_of_all.get(key[0], ()):
                client.changed(*key)
        for key in removed:
            if key in self._followers:
                self._removed.add(key)
            else:
                self._drop(key)
        RESOURCES.set(len(self._resources))
        return changed

    def _drop(self, key: Key) -> None:
        self._removed.discard(key)
        self._resources.pop(key, None)
        self._names[key[0]].discard(key[1])

    def followers(self, url: str, name: str) -> frozenset[Client]:
        """Who is told of each change of a resource."""
        return frozenset(self._followers.get((url, name), ()))

    def followers_of(self, service: str) -> list[Client]:
        """Who follows the endpoints of a service, or of a part of it."""
        found: set[Client] = set()
        for (url, name), followers in self._followers.items():
            if url == ENDPOINT and service_of(url, name) == service:
                found |= followers
        return list(found)

    def follow(self, client: Client, url: str, name: str) -> None:
        """Tell a client of each change of a resource."""
        self._followers.setdefault((url, name), set()).add(client)
        if (url, name) not in self._resources and self.unknown is not None:
            self.unknown(service_of(url, name))

    def follow_all(self, client: Client, url: str) -> None:
        """Tell a client of each change of a type."""
        self._followers_of_all.setdefault(url, set()).add(client)

    def unfollow(self, client: Client, url: str, name: str) -> None:
        """End that."""
        key = (url, name)
        followers = self._followers.get(key)
        if followers is None:
            return
        followers.discard(client)
        if not followers:
            del self._followers[key]
            if key in self._removed:
                self._drop(key)

    def connect(self, peer: str) -> Client:
        """A new client; `disconnect` it at its end.

        Args:
            peer: Service name of its identity.
        """
        client = Client(self, peer)
        self.clients.add(client)
        STREAMS.set(len(self.clients))
        return client

    def disconnect(self, client: Client) -> None:
        """Forget a client."""
        client.leave()
        for followers in self._followers_of_all.values():
            followers.discard(client)
        self.clients.discard(client)
        STREAMS.set(len(self.clients))
