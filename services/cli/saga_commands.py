"""`plexus saga …`: arguments in, one function call, output out."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from services.cli.edge import Edge, asks_edge
from services.cli.options import JsonOption, print_json
from services.cli.saga import Sagas, read_definition, read_input

saga_app = typer.Typer(help="Sagas: work in steps that is done as a whole or undone.", no_args_is_help=True)

SagaArgument = Annotated[str, typer.Argument(help="Id of the saga.")]


def _show(saga: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(saga)
        return
    from services.cli.saga_tables import saga_table  # noqa: PLC0415 - rich is slow to import

    saga_table(saga)


@saga_app.command("ls")
@asks_edge("demo")
def list_sagas(
    edge: Edge,
    *,
    definition: Annotated[str, typer.Option("--definition", "-d", help="Only sagas of this one.")] = "",
    only: Annotated[str, typer.Option(help="running, compensating, succeeded, compensated or stuck.")] = "",
    stuck: Annotated[bool, typer.Option("--stuck", help="The same as --only stuck.")] = False,
    definitions: Annotated[bool, typer.Option("--definitions", help="The definitions instead.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Sagas.", min=1, max=10_000)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List sagas, the newest first."""
    wanted = "stuck" if stuck else only
    with edge.open(Sagas) as sagas:
        found = sagas.definitions() if definitions else sagas.listed(definition, wanted, limit)
    if as_json:
        print_json(found)
        return
    from services.cli import saga_tables  # noqa: PLC0415 - rich is slow to import

    (saga_tables.definitions_table if definitions else saga_tables.sagas_table)(found)


@saga_app.command()
@asks_edge("demo")
def define(
    edge: Edge,
    files: Annotated[list[str], typer.Argument(help="Definitions in YAML or JSON; - is standard input.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Make definitions, or new versions of them."""
    given = [read_definition(file) for file in files]
    with edge.open(Sagas) as sagas:
        made = [sagas.define(each) for each in given]
    if as_json:
        print_json(made)
        return
    for each in made:
        typer.echo(f"{each['name']} v{each['version']}")


@saga_app.command()
@asks_edge("demo")
def start(
    edge: Edge,
    definition: Annotated[str, typer.Argument(help="Name of the definition.")],
    *,
    input_json: Annotated[str, typer.Option("--input", "-i", help="JSON object that each step gets.")] = "{}",
    saga_id: Annotated[str, typer.Option("--id", help="Default: a random one.")] = "",
    request_id: Annotated[
        str, typer.Option(help="Repeated with the same one, the command starts no second saga.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Start a saga; prints its id."""
    value = read_input(input_json)
    with edge.open(Sagas) as sagas:
        saga = sagas.start(definition, value, saga_id, request_id)
    if as_json:
        print_json(saga)
    else:
        typer.echo(saga["id"])


@saga_app.command()
@asks_edge("demo")
def get(
    edge: Edge,
    saga: SagaArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show a saga and its steps."""
    with edge.open(Sagas) as sagas:
        _show(sagas.get(saga), as_json=as_json)


@saga_app.command()
@asks_edge("demo")
def watch(
    edge: Edge,
    saga: SagaArgument,
    *,
    after: Annotated[int, typer.Option(help="The last revision that was seen.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Print the history of a saga, and each change until it has ended; exit code 1 if it was undone."""
    from services.cli.saga_tables import event_line  # noqa: PLC0415 - rich is slow to import

    last = ""
    with edge.open(Sagas) as sagas:
        for event in sagas.watch(saga, after):
            typer.echo(json.dumps(event, ensure_ascii=False) if as_json else event_line(event))
            sys.stdout.flush()
            last = event["state"]
    if last == "SAGA_STATE_COMPENSATED":
        raise typer.Exit(1)


@saga_app.command()
@asks_edge("demo")
def cancel(
    edge: Edge,
    saga: SagaArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Have a saga undone, once its present attempt has ended."""
    with edge.open(Sagas) as sagas:
        _show(sagas.cancel(saga), as_json=as_json)


@saga_app.command()
@asks_edge("demo")
def retry(
    edge: Edge,
    saga: SagaArgument,
    *,
    skip: Annotated[
        bool, typer.Option("--skip", help="The compensation was done by hand: go on with the next.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a stuck saga go on."""
    with edge.open(Sagas) as sagas:
        _show(sagas.retry(saga, skip=skip), as_json=as_json)
