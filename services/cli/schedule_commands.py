"""`plexus schedule …`: arguments in, one function call, output out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.edge import Edge, asks_edge
from services.cli.options import JsonOption, print_json
from services.cli.schedule import Schedules, When, message, missed_runs

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
AttributeOption = Annotated[
    list[str] | None, typer.Option("--attribute", "-a", help="KEY=VALUE; repeatable.")
]
KeyOption = Annotated[str, typer.Option(help="Ordering key.")]
PriorityOption = Annotated[str, typer.Option(help="low, normal, high or critical.")]
TtlOption = Annotated[str, typer.Option(help="The message is given up when it has waited this long.")]
CorrelationOption = Annotated[str, typer.Option(help="Of the work that it belongs to.")]
RequestOption = Annotated[str, typer.Option(help="Makes a repetition safe.")]


def _show(schedule: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(schedule)
        return
    from services.cli.schedule_tables import schedule_lines  # noqa: PLC0415 - rich is slow to import

    schedule_lines(schedule)


@schedule_app.command("ls")
@asks_edge("demo")
def list_schedules(
    edge: Edge,
    *,
    topic: Annotated[str, typer.Option(help="Only those that publish to it.")] = "",
    only: Annotated[str, typer.Option(help="active, paused or completed.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="Schedules.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
) -> None:
    """List schedules by name."""
    with edge.open(Schedules) as schedules:
        found = schedules.listed(topic, only, limit)
    if as_json:
        print_json(found)
        return
    from services.cli.schedule_tables import schedules_table  # noqa: PLC0415 - rich is slow to import

    schedules_table(found)


@schedule_app.command()
@asks_edge("demo")
def create(
    edge: Edge,
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
    attribute: AttributeOption = None,
    key: KeyOption = "",
    priority: PriorityOption = "",
    ttl: TtlOption = "",
    correlation_id: CorrelationOption = "",
    missed: Annotated[str, typer.Option(help="Missed firings: skip, once or all. Default: once.")] = "",
    max_missed: Annotated[int, typer.Option(help="With all: at most so many.", min=1, max=1000)] = 100,
    paused: Annotated[bool, typer.Option("--paused", help="It waits to be resumed.")] = False,
    request_id: RequestOption = "",
    as_json: JsonOption = False,
) -> None:
    """Create a schedule."""
    when = When(cron, zone, at, every, anchor, jitter, start, end, max_firings)
    wanted = when.fields() | {
        "name": name,
        "topic": topic,
        "message": message(
            data, attribute or [], key=key, priority=priority, ttl=ttl, correlation_id=correlation_id
        ),
        "maxMissedRuns": max_missed,
        "paused": paused,
    }
    if missed:
        wanted["missedRuns"] = missed_runs(missed)
    with edge.open(Schedules) as schedules:
        made = schedules.create(wanted, request_id)
    _show(made, as_json=as_json)


@schedule_app.command()
@asks_edge("demo")
def update(
    edge: Edge,
    name: NameArgument,
    *,
    topic: Annotated[str, typer.Option(help="Where it publishes.")] = "",
    cron: CronOption = "",
    zone: Annotated[str, typer.Option(help="Time zone of its cron expression.")] = "",
    at: AtOption = "",
    every: EveryOption = "",
    anchor: Annotated[str, typer.Option(help="A time that its interval counts from.")] = "",
    jitter: Annotated[str, typer.Option(help="Put each firing off by a part of this span; 0 is none.")] = "",
    start: Annotated[str, typer.Option("--start", help="No firing before this time; or none.")] = "",
    end: Annotated[str, typer.Option("--end", help="No firing from this time on; or none.")] = "",
    max_firings: Annotated[int | None, typer.Option(help="Done after so many; 0 is no bound.", min=0)] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Content of the message.")] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="KEY=VALUE; repeatable; instead of all there are."),
    ] = None,
    key: KeyOption = "",
    priority: PriorityOption = "",
    ttl: TtlOption = "",
    correlation_id: CorrelationOption = "",
    missed: Annotated[str, typer.Option(help="Missed firings: skip, once or all.")] = "",
    max_missed: Annotated[
        int | None, typer.Option(help="With all: at most so many.", min=1, max=1000)
    ] = None,
    request_id: RequestOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change what is given of a schedule; new times count from now."""
    changes = When(cron, zone, at, every, anchor, jitter, start, end, max_firings).changes()
    text = message(data, attribute or [], key=key, priority=priority, ttl=ttl, correlation_id=correlation_id)
    given = (("topic", topic), ("message", text), ("maxMissedRuns", max_missed))
    changes |= {field: value for field, value in given if value}
    if missed:
        changes["missedRuns"] = missed_runs(missed)
    with edge.open(Schedules) as schedules:
        changed = schedules.update(name, changes, request_id)
    _show(changed, as_json=as_json)


@schedule_app.command()
@asks_edge("demo")
def preview(
    edge: Edge,
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
) -> None:
    """Show when a schedule would fire, without making it."""
    when = When(cron, zone, at, every, anchor, "", start, end, max_firings)
    fields = when.fields()
    with edge.open(Schedules) as schedules:
        times = schedules.preview(fields, count)
    if as_json:
        print_json(times)
        return
    for time in times:
        typer.echo(time)


@schedule_app.command()
@asks_edge("demo")
def get(
    edge: Edge,
    name: NameArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show a schedule: when it fires next, what it did last."""
    with edge.open(Schedules) as schedules:
        _show(schedules.get(name), as_json=as_json)


@schedule_app.command()
@asks_edge("demo")
def pause(
    edge: Edge,
    name: NameArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Stop its firings until it is resumed."""
    with edge.open(Schedules) as schedules:
        _show(schedules.act(name, "pause"), as_json=as_json)


@schedule_app.command()
@asks_edge("demo")
def resume(
    edge: Edge,
    name: NameArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Let it fire again, from now on."""
    with edge.open(Schedules) as schedules:
        _show(schedules.act(name, "resume"), as_json=as_json)


@schedule_app.command()
@asks_edge("demo")
def run(
    edge: Edge,
    name: NameArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Publish its message now; prints the message's id."""
    with edge.open(Schedules) as schedules:
        made = schedules.act(name, "run")
    if as_json:
        print_json(made)
    else:
        typer.echo(made["messageId"])


@schedule_app.command("rm")
@asks_edge("demo")
def remove(
    edge: Edge,
    names: Annotated[list[str], typer.Argument(help="Names of schedules.")],
) -> None:
    """Delete schedules with their history."""
    with edge.open(Schedules) as schedules:
        for name in names:
            schedules.delete(name)
    for name in names:
        typer.echo(f"{name} deleted")


@schedule_app.command()
@asks_edge("demo")
def runs(
    edge: Edge,
    name: NameArgument,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Runs.", min=1, max=1000)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show what it did, the newest first."""
    with edge.open(Schedules) as schedules:
        found = schedules.runs(name, limit)
    if as_json:
        print_json(found)
        return
    from services.cli.schedule_tables import runs_table  # noqa: PLC0415 - rich is slow to import

    runs_table(found)
