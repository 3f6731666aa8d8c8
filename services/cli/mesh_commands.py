"""`plexus mesh …`: arguments in, one function call, output out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.options import JsonOption, StateOption, print_json, state_folder

mesh_app = typer.Typer(help="The mesh: policies, intentions, who is told what.", no_args_is_help=True)

PathsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Files of policies and intentions, or folders of them. Default: those shipped with Plexus."
    ),
]


class Kind(StrEnum):
    """What is shown."""

    ALL = "all"
    POLICIES = "policies"
    INTENTIONS = "intentions"


@mesh_app.command()
def apply(
    paths: PathsArgument = None,
    *,
    remove: Annotated[
        list[str] | None, typer.Option(help="Service whose written policy is removed; repeatable.")
    ] = None,
    remove_intentions: Annotated[
        list[str] | None,
        typer.Option(help="Service whose written intentions are removed, * for any; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check traffic policies and intentions and put them in force: all or, if one is at fault, none."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    removed = mesh.Removed(remove or [], remove_intentions or [])
    policies, intentions = mesh.apply(state_folder(state), paths or [], removed, dry_run=dry_run)
    if as_json:
        print_json(
            {"applied": mesh.as_json(policies)["applied"], "intentions": mesh.as_json(intentions)["applied"]}
        )
        return
    note = " (not written)" if dry_run else ""
    for applied in policies.applied:
        typer.echo(f"{applied.service} {mesh.CHANGES[applied.change]}{note}")
    for changed in intentions.applied:
        typer.echo(f"intentions of {changed.destination} {mesh.CHANGES[changed.change]}{note}")


@mesh_app.command()
def diff(paths: PathsArgument = None, *, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show how files of policies and intentions differ from what is in force; exit code 1 if they do."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    lines = mesh.diff(state_folder(state), paths or [])
    if as_json:
        print_json({"differs": bool(lines), "lines": lines})
    else:
        for line in lines:
            typer.echo(line)
    if lines:
        raise typer.Exit(1)


@mesh_app.command()
def get(
    service: Annotated[str, typer.Argument(help="One service; default: all.")] = "",
    *,
    kind: Annotated[Kind, typer.Option(help="What to print.")] = Kind.ALL,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the policies and intentions in force, and why newer ones were refused."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    folder = state_folder(state)
    found: dict[str, Any] = {}
    texts: list[str] = []
    if kind is not Kind.INTENTIONS:
        policies = mesh.policies(folder, service)
        found |= mesh.as_json(policies)
        texts += [_in_force(each.service, each) for each in policies.policies]
        if not policies.policies:
            texts.append(
                "the default policy applies" + (f" to {service}" if service else " to every service")
            )
    if kind is not Kind.POLICIES:
        documents = mesh.intention_documents(folder, service)
        found["intentions"] = [mesh.as_json(each) for each in documents]
        texts += [_in_force(f"intentions of {each.destination}", each) for each in documents]
        if not documents:
            texts.append("no intentions" + (f" for {service}" if service else ""))
    if as_json:
        print_json(found)
        return
    for text in texts:
        typer.echo(text)


def _in_force(what: str, kept: Any) -> str:
    refusals = [f"# refused: {problem}" for problem in kept.refusal.splitlines()]
    return "\n".join([f"# {what}: {kept.origin or 'none in force'}", *refusals, kept.text])


@mesh_app.command()
def intentions(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show who may call whom; whatever is not here is denied."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.intentions(state_folder(state))
    if as_json:
        print_json(mesh.as_json(answer))
        return
    from services.cli.mesh_tables import intentions_table  # noqa: PLC0415 - rich is slow to import

    intentions_table(answer)


@mesh_app.command()
def graph(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show the services and which of them call which."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.graph(state_folder(state))
    if as_json:
        print_json(mesh.as_json(answer))
        return
    from services.cli.mesh_tables import graph_tables  # noqa: PLC0415 - rich is slow to import

    graph_tables(answer)


@mesh_app.command()
def clients(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show the connected clients, and what they refused."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.clients(state_folder(state))
    if as_json:
        print_json(mesh.as_json(answer))
        return
    from services.cli.mesh_tables import clients_table  # noqa: PLC0415 - rich is slow to import

    clients_table(answer)


@mesh_app.command()
def explain(
    service: Annotated[str, typer.Argument(help="Which service.")],
    *,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one service: policy, instances, and what each client was last sent, accepted and refused.

    Exit code 1 if nobody serves it and nobody calls it.
    """
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.explain(state_folder(state), service)
    if as_json:
        print_json(mesh.as_json(answer))
    else:
        from services.cli.mesh_tables import explanation  # noqa: PLC0415 - rich is slow to import

        explanation(answer)
    if not answer.instances and not answer.followers:
        typer.echo(f"plexus: no instance of {service} is registered, and nobody calls it", err=True)
        raise typer.Exit(1)
