"""Tables of `plexus mesh …`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from plexus.mesh.v1 import mesh_pb2

_WIDE = 400
_STYLES = {"allow": "green", "deny": "red", "some": "yellow", "serving": "green"}


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _styled(text: str) -> str:
    style = _STYLES.get(text)
    return f"[{style}]{text}[/{style}]" if style else escape(text)


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    # Without a terminal there is no width to keep to, and a cut name is of no use to a program.
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_WIDE)


def intentions_table(answer: mesh_pb2.ListIntentionsResponse) -> None:
    """Print who may call whom."""
    table = _table("DESTINATION", "SOURCE", "RULE")
    for intention in answer.intentions:
        rules = [intention.action] if intention.action else list(intention.permissions)
        for number, rule in enumerate(rules):
            first = number == 0
            table.add_row(
                intention.destination if first else "", intention.source if first else "", _styled(rule)
            )
    _console().print(table)


def graph_tables(answer: mesh_pb2.Graph) -> None:
    """Print services and who follows them."""
    nodes = _table("SERVICE", "SERVING", "INSTANCES", "POLICY")
    for node in answer.nodes:
        nodes.add_row(
            node.service, str(node.serving), str(node.instances), "own" if node.policy else "default"
        )
    edges = _table("CALLER", "SERVICE", "CLIENTS", "INTENTION")
    for edge in answer.edges:
        edges.add_row(edge.source, edge.destination, str(edge.clients), _styled(edge.intention))
    console = _console()
    console.print(nodes)
    console.print()
    console.print(edges)


def clients_table(answer: mesh_pb2.ListClientsResponse) -> None:
    """Print the connected clients."""
    table = _table("NODE", "IDENTITY", "ZONE", "LIBRARY", "SINCE", "BEHIND", "FOLLOWS")
    for client in answer.clients:
        table.add_row(
            escape(client.node),
            client.peer,
            escape(client.zone),
            escape(client.library),
            client.connected.ToDatetime().strftime("%H:%M:%S"),
            str(client.behind),
            " ".join(client.services),
        )
    console = _console()
    console.print(table)
    for client in answer.clients:
        for refusal in client.refusals:
            console.print(f"{escape(client.node)} refused: {escape(refusal)}", style="red")


def explanation(answer: mesh_pb2.Explanation) -> None:
    """Print everything about one service."""
    console = _console()
    console.print(f"[bold]{answer.service}[/bold]")
    policy = answer.policy
    console.print(f"policy: {escape(policy.origin) or 'default'}")
    for problem in policy.refusal.splitlines():
        console.print(f"refused: {escape(problem)}", style="red")
    _instances(console, answer)
    if not answer.followers:
        console.print("no client of this control plane follows it", style="dim")
        return
    table = _table("CLIENT", "IDENTITY", "RESOURCE", "NAME", "CURRENT", "SENT", "ACCEPTED")
    for follower in answer.followers:
        for number, resource in enumerate(follower.resources):
            first = number == 0
            accepted = (
                f"[green]{resource.accepted}[/green]" if resource.current_accepted else resource.accepted
            )
            table.add_row(
                escape(follower.node) if first else "",
                follower.peer if first else "",
                resource.kind,
                escape(resource.name),
                resource.current,
                resource.sent,
                accepted or "[yellow]nothing yet[/yellow]",
            )
    console.print(table)
    for follower in answer.followers:
        for refusal in sorted({resource.refusal for resource in follower.resources if resource.refusal}):
            console.print(f"{escape(follower.node)} refused: {escape(refusal)}", style="red")


def _instances(console: Console, answer: mesh_pb2.Explanation) -> None:
    if not answer.instances:
        console.print("no instances", style="yellow")
        return
    table = _table("INSTANCE", "ADDRESS", "VERSION", "ZONE", "WEIGHT", "HEALTH")
    for entry in answer.instances:
        table.add_row(
            entry.id,
            entry.address,
            escape(entry.version),
            escape(entry.zone),
            str(entry.weight),
            _styled(entry.health),
        )
    console.print(table)
    for entry in answer.instances:
        if entry.waits_for:
            console.print(f"{entry.id} waits for {escape(entry.waits_for)}", style="red")
