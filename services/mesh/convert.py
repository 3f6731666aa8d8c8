"""From the control plane's state to the messages that describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.mesh.v1 import mesh_pb2
from services.mesh.intentions import WILDCARD
from services.mesh.registry.domain import WAITS_META, Health
from services.mesh.xds.resources import PUSH_ORDER, ROUTE, service_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.mesh.ads.client import Client, Subscription
    from services.mesh.ads.hub import Hub
    from services.mesh.intention_store import Kept
    from services.mesh.intentions import IntentionTable, Source
    from services.mesh.plane import Plane
    from services.mesh.policy.table import PolicyTable
    from services.mesh.registry.domain import Instance


def policy(table: PolicyTable, service: str) -> mesh_pb2.Policy | None:
    """A service's policy, if it has one or should have had."""
    document = table.document(service)
    refusal = table.refusals.get(service, "")
    if document is None and not refusal:
        return None
    origin, text = ("", "") if document is None else (document.origin, document.text)
    return mesh_pb2.Policy(service=service, origin=origin, text=text, refusal=refusal)


def policies(table: PolicyTable, service: str = "") -> list[mesh_pb2.Policy]:
    """All policies, or one service's."""
    names = [service] if service else sorted({*table.services(), *table.refusals})
    return [message for name in names if (message := policy(table, name)) is not None]


def intentions(table: IntentionTable) -> list[mesh_pb2.Intention]:
    """All rules."""
    return [
        mesh_pb2.Intention(
            source=source,
            destination=destination,
            action=rule.Action or "",
            permissions=map(str, _permissions(rule)),
        )
        for destination, by_source in sorted(table.by_destination.items())
        for source, rule in sorted(by_source.items())
    ]


def intention_document(kept: Kept) -> mesh_pb2.IntentionDocument:
    """A text of intentions."""
    return mesh_pb2.IntentionDocument(
        destination=kept.destination, origin=kept.origin, text=kept.text, refusal=kept.refusal
    )


def _permissions(rule: Source) -> list[str]:
    texts = []
    for permission in rule.Permissions:
        http = permission.HTTP
        path = http.PathExact or (f"{http.PathPrefix}*" if http.PathPrefix else f"~ {http.PathRegex}")
        texts.append(f"{permission.Action} {path}")
    return texts


def intention(table: IntentionTable, source: str, destination: str) -> str:
    """What the rules say of a pair: allow, deny, or some."""
    if table.fault(destination):
        return "deny"
    for to in (destination, WILDCARD):
        for by in (source, WILDCARD):
            rule = table.by_destination.get(to, {}).get(by)
            if rule is not None:
                return rule.Action or "some"
    return "deny"


def followed(client: Client) -> set[str]:
    """Services that a client follows."""
    return _services(client, PUSH_ORDER)


def _services(client: Client, urls: Iterable[str]) -> set[str]:
    return {
        service_of(url, name)
        for url in urls
        if (subscription := client.subscriptions.get(url)) is not None
        for name in subscription.names
    }


def client(connected: Client) -> mesh_pb2.Client:
    """A client in short."""
    subscriptions = connected.subscriptions.values()
    message = mesh_pb2.Client(
        node=connected.node,
        peer=connected.peer,
        zone=connected.zone,
        library=connected.library,
        services=sorted(followed(connected)),
        behind=sum(
            version != subscription.acked.get(name)
            for subscription in subscriptions
            for name, version in subscription.sent.items()
        ),
        refusals=[entry.refusal.text for entry in subscriptions if entry.refusal is not None],
    )
    message.connected.FromMilliseconds(round(connected.connected * 1000))
    return message


def clients(connected: Iterable[Client]) -> list[mesh_pb2.Client]:
    """All clients, in a steady order."""
    return sorted(
        map(client, connected), key=lambda message: (message.node, message.connected.ToNanoseconds())
    )


def graph(hub: Hub, plane: Plane, table: IntentionTable) -> mesh_pb2.Graph:
    """Services and who follows them."""
    message = mesh_pb2.Graph()
    for service in plane.services():
        instances = plane.instances(service)
        message.nodes.add(
            service=service,
            serving=sum(instance.health is Health.SERVING for instance in instances),
            instances=len(instances),
            policy=plane.policies.document(service) is not None,
        )
    edges: dict[tuple[str, str], int] = {}
    for connected in hub.clients:
        # Who follows routes alone, as the edge does beside its Envoy, calls nobody by them.
        for service in _services(connected, set(PUSH_ORDER) - {ROUTE}):
            edges[connected.peer, service] = edges.get((connected.peer, service), 0) + 1
    for (source, destination), count in sorted(edges.items()):
        message.edges.add(
            source=source,
            destination=destination,
            clients=count,
            intention=intention(table, source, destination),
        )
    return message


def explanation(hub: Hub, plane: Plane, service: str) -> mesh_pb2.Explanation:
    """Everything about one service."""
    message = mesh_pb2.Explanation(
        service=service,
        policy=policy(plane.policies, service),
        instances=map(_instance, plane.instances(service)),
    )
    for connected in sorted(hub.clients, key=lambda entry: (entry.node, entry.connected)):
        resources = [
            _resource(hub, connected, url, subscription, name)
            for url in PUSH_ORDER
            if (subscription := connected.subscriptions.get(url)) is not None
            for name in sorted(subscription.names | subscription.sent.keys())
            if service_of(url, name) == service
        ]
        if resources:
            message.followers.add(
                node=connected.node, peer=connected.peer, library=connected.library, resources=resources
            )
    return message


def _resource(
    hub: Hub, connected: Client, url: str, subscription: Subscription, name: str
) -> mesh_pb2.Explanation.Resource:
    published = hub.get(url, name)
    current = "" if published is None else published.seen_from(connected.zone, connected.runs_on).version
    accepted = subscription.acked.get(name, "")
    refusal = subscription.refusal
    return mesh_pb2.Explanation.Resource(
        kind=url.rpartition(".")[2],
        name=name,
        current=current,
        sent=subscription.sent.get(name, ""),
        accepted=accepted,
        refusal=refusal.text if refusal is not None and name in refusal.versions else "",
        current_accepted=bool(current) and accepted == current,
    )


def _instance(entry: Instance) -> mesh_pb2.Explanation.Instance:
    return mesh_pb2.Explanation.Instance(
        id=entry.id,
        address=f"{entry.address}:{entry.port}",
        version=entry.version,
        zone=entry.zone,
        weight=entry.weight,
        health=entry.health.value,
        waits_for=entry.meta.get(WAITS_META, ""),
    )
