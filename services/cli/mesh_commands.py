"""`plexus mesh …`: arguments in, one function call, output out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import JsonOption, StateOption, print_json, state_folder

mesh_app = typer.Typer(help="The mesh: policies, intentions, who is told what.", no_args_is_help=True)

PathsArgument = Annotated[
    list[Path] | None,
    typer.Argument(help="Policy files, or folders of them. Default: those shipped with Plexus."),
]


@mesh_app.command()
def apply(
    paths: PathsArgument = None,
    *,
    remove: Annotated[
        list[str] | None, typer.Option(help="Service whose written policy is removed; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check traffic policies and put them in force: all or none."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.apply(state_folder(state), paths or [], remove or [], dry_run=dry_run)
    if as_json:
        print_json(mesh.as_json(answer))
        return
    for applied in answer.applied:
        typer.echo(f"{applied.service} {mesh.CHANGES[applied.change]}{' (not written)' if dry_run else ''}")


@mesh_app.command()
def diff(paths: PathsArgument = None, *, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show how policy files differ from what is in force; exit code 1 if they do."""
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
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the policies in force, and why newer ones were refused."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.policies(state_folder(state), service)
    if as_json:
        print_json(mesh.as_json(answer))
        return
    if not answer.policies:
        typer.echo("the default policy applies" + (f" to {service}" if service else " to every service"))
    for policy in answer.policies:
        typer.echo(f"# {policy.service}: {policy.origin or 'none in force'}")
        for problem in policy.refusal.splitlines():
            typer.echo(f"# refused: {problem}")
        typer.echo(policy.text)


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
    """Show one service: policy, instances, and what each client was last sent, accepted and refused."""
    from services.cli import mesh  # noqa: PLC0415 - gRPC is slow to import

    answer = mesh.explain(state_folder(state), service)
    if as_json:
        print_json(mesh.as_json(answer))
        return
    from services.cli.mesh_tables import explanation  # noqa: PLC0415 - rich is slow to import

    explanation(answer)
