"""`plexus schedule …`: arguments in, one function call, output out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.options import (
    ConsumerOption,
    JsonOption,
    StateOption,
    TokenOption,
    UrlOption,
    print_json,
    state_folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

schedule_app = typer.Typer(help="Messages published at set times.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the schedule.")]
CronOption = Annotated[
    str, typer.Option(help="Five fields, six with the second first, or @daily and the like.")
]
ZoneOption = Annotated[str, typer.Option(help="Time zone of --cron, such as Europe/Berlin. Default: UTC.")]
AtOption = Annotated[str, typer.Option(help="Once: 2026-12-24T18:00:00Z, or +10m from now.")]
EveryOption = Annotated[str, typer.Option(help="Interval: 90s, 15m, 1h or 7d.")]
AnchorOption = Annotated[str, typer.Option(help="A time that --every counts from. Default: now.")]
JitterOption = Annotated[str, typer.Option(help="Put each firing off by a part of this span.")]
StartOption = Annotated[str, typer.Option("--start", help="No firing before this time.")]
EndOption = Annotated[str, typer.Option("--end", help="No firing from this time on.")]
MaxOption = Annotated[int, typer.Option(help="Done after so many; 0 is no bound.", min=0)]


def _ask(
    state: Path | None, url: str | None, token: str | None, consumer: str, work: Callable[[Any], Any]
) -> Any:
    """Do work with the API."""
    from services.cli import content  # noqa: PLC0415 - httpx is slow to import
    from services.cli.schedule import Schedules  # noqa: PLC0415 - the same

    folder = state_folder(state)
    with content.open_api(folder, url, token, consumer) as api:
        return work(Schedules(api))


def _show(schedule: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(schedule)
        return
    from services.cli.schedule_tables import schedule_lines  # noqa: PLC0415 - rich is slow to import

    schedule_lines(schedule)


@schedule_app.command("ls")
def list_schedules(
    *,
    topic: Annotated[str, typer.Option(help="Only those that publish to it.")] = "",
    only: Annotated[str, typer.Option(help="active, paused or completed.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="Schedules.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """List schedules by name."""
    found = _ask(state, url, token, consumer, lambda schedules: schedules.listed(topic, only, limit))
    if as_json:
        print_json(found)
        return
    from services.cli.schedule_tables import schedules_table  # noqa: PLC0415 - rich is slow to import

    schedules_table(found)


@schedule_app.command()
def create(
    name: NameArgument,
    *,
    topic: Annotated[str, typer.Option(help="Where it publishes.")],
    cron: CronOption = "",
    zone: ZoneOption = "",
    at: AtOption = "",
    every: EveryOption = "",
    anchor: AnchorOption = "",
    jitter: JitterOption = "",
    start: StartOption = "",
    end: EndOption = "",
    max_firings: MaxOption = 0,
    data: Annotated[str, typer.Option("--data", "-d", help="Content of the message.")] = "",
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", "-a", help="KEY=VALUE; repeatable.")
    ] = None,
    key: Annotated[str, typer.Option(help="Ordering key.")] = "",
    priority: Annotated[str, typer.Option(help="low, normal, high or critical.")] = "",
    ttl: Annotated[str, typer.Option(help="The message is given up when it has waited this long.")] = "",
    correlation_id: Annotated[str, typer.Option(help="Of the work that it belongs to.")] = "",
    missed: Annotated[str, typer.Option(help="Missed firings: skip, once or all. Default: once.")] = "",
    max_missed: Annotated[int, typer.Option(help="With all: at most so many.", min=1, max=1000)] = 100,
    paused: Annotated[bool, typer.Option("--paused", help="It waits to be resumed.")] = False,
    request_id: Annotated[str, typer.Option(help="Makes a repetition safe.")] = "",
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Create a schedule."""
    from services.cli import schedule  # noqa: PLC0415 - httpx is slow to import

    when = schedule.When(cron, zone, at, every, anchor, jitter, start, end, max_firings)
    wanted = when.fields() | {
        "name": name,
        "topic": topic,
        "message": schedule.message(
            data, attribute or [], key=key, priority=priority, ttl=ttl, correlation_id=correlation_id
        ),
        "maxMissedRuns": max_missed,
        "paused": paused,
    }
    made = _ask(state, url, token, consumer, lambda schedules: schedules.create(wanted, missed, request_id))
    _show(made, as_json=as_json)


@schedule_app.command()
def preview(
    *,
    cron: CronOption = "",
    zone: ZoneOption = "",
    at: AtOption = "",
    every: EveryOption = "",
    anchor: AnchorOption = "",
    start: StartOption = "",
    end: EndOption = "",
    max_firings: MaxOption = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="Times.", min=1, max=100)] = 10,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Show when a schedule would fire, without making it."""
    from services.cli import schedule  # noqa: PLC0415 - httpx is slow to import

    when = schedule.When(cron, zone, at, every, anchor, "", start, end, max_firings)
    fields = when.fields()
    times = _ask(state, url, token, consumer, lambda schedules: schedules.preview(fields, count))
    if as_json:
        print_json(times)
        return
    for time in times:
        typer.echo(time)


@schedule_app.command()
def get(
    name: NameArgument,
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Show a schedule: when it fires next, what it did last."""
    _show(_ask(state, url, token, consumer, lambda schedules: schedules.get(name)), as_json=as_json)


@schedule_app.command()
def pause(
    name: NameArgument,
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Stop its firings until it is resumed."""
    _show(_ask(state, url, token, consumer, lambda schedules: schedules.act(name, "pause")), as_json=as_json)


@schedule_app.command()
def resume(
    name: NameArgument,
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Let it fire again, from now on."""
    _show(_ask(state, url, token, consumer, lambda schedules: schedules.act(name, "resume")), as_json=as_json)


@schedule_app.command()
def run(
    name: NameArgument,
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Publish its message now; prints the message's id."""
    made = _ask(state, url, token, consumer, lambda schedules: schedules.act(name, "run"))
    if as_json:
        print_json(made)
    else:
        typer.echo(made["messageId"])


@schedule_app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(help="Names of schedules.")],
    *,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Delete schedules with their history."""
    _ask(state, url, token, consumer, lambda schedules: [schedules.delete(name) for name in names])
    for name in names:
        typer.echo(f"{name} deleted")


@schedule_app.command()
def runs(
    name: NameArgument,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Runs.", min=1, max=1000)] = 20,
    as_json: JsonOption = False,
    state: StateOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    consumer: ConsumerOption = "demo",
) -> None:
    """Show what it did, the newest first."""
    found = _ask(state, url, token, consumer, lambda schedules: schedules.runs(name, limit))
    if as_json:
        print_json(found)
        return
    from services.cli.schedule_tables import runs_table  # noqa: PLC0415 - rich is slow to import

    runs_table(found)
