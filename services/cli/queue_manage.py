"""`plexus queue subscriptions …`, `plexus queue dlq …` and `plexus worker`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.edge import Edge, asks_edge
from services.cli.options import JsonOption, StateOption, one_of, print_json, state_folder
from services.cli.queue import Queues, pairs, readable, span
from services.cli.queue_commands import (
    FromOption,
    IdOption,
    LabelOption,
    LimitOption,
    ReasonOption,
    SubscriptionArgument,
    confirm,
    dlq_app,
    queue_app,
    subscriptions_app,
)

BACKOFFS = ("immediate", "fixed", "linear", "exponential")
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _chosen(ids: list[str] | None, reason: str, topic: str) -> dict[str, Any]:
    condition = {key: value for key, value in (("reason", reason), ("topic", topic)) if value}
    return {"ids": ids or [], "filter": condition}


@subscriptions_app.command("ls")
@asks_edge("admin")
def subscriptions_ls(
    edge: Edge,
    topic: Annotated[str, typer.Option(help="Only those of this topic.")] = "",
    *,
    as_json: JsonOption = False,
) -> None:
    """List subscriptions with their settings."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    with edge.open(Queues) as queues:
        found = queues.subscriptions(topic)
    print_json(found) if as_json else queue_tables.subscriptions(found)


@subscriptions_app.command("create")
@asks_edge("admin")
def subscriptions_create(
    edge: Edge,
    subscription: SubscriptionArgument,
    topic: Annotated[str, typer.Argument(help="Topic, or a pattern such as `orders.*.created`.")],
    *,
    lease: Annotated[str, typer.Option(help="How long a consumer has a message.")] = "30s",
    attempts: Annotated[int, typer.Option(help="Deliveries before it is given up.", min=1, max=1000)] = 5,
    backoff: Annotated[str, typer.Option(help="immediate, fixed, linear or exponential.")] = "exponential",
    minimum: Annotated[str, typer.Option(help="First pause.")] = "1s",
    maximum: Annotated[str, typer.Option(help="Longest pause.")] = "10m",
    ordered: Annotated[bool, typer.Option("--ordered", help="Keep the order of each ordering key.")] = False,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="One consumer at a time.")] = False,
    condition: Annotated[str, typer.Option("--filter", help="Only messages whose attributes fit.")] = "",
    dead_letter_topic: Annotated[str, typer.Option(help="Where given-up messages are published.")] = "",
    ttl: Annotated[str, typer.Option(help="Messages are given up after.")] = "",
    label: LabelOption = None,
) -> None:
    """Make a subscription; it gets what is published from then on."""
    from services.cli.durations import seconds  # noqa: PLC0415 - see the module's docstring

    first = span(seconds(minimum))
    settings: dict[str, Any] = {
        "name": subscription,
        "topic": topic,
        "ackDeadline": span(seconds(lease)),
        "retry": {
            "backoff": f"BACKOFF_{one_of('backoff', backoff, BACKOFFS)}",
            "minimum": first,
            "maximum": span(max(seconds(minimum), seconds(maximum))),
            "maxAttempts": attempts,
        },
        "ordered": ordered,
        "exclusive": exclusive,
        "filter": condition,
        "deadLetterTopic": dead_letter_topic,
        "labels": pairs(label or (), "--label"),
    }
    if ttl:
        settings["ttl"] = span(seconds(ttl))
    with edge.open(Queues) as queues:
        queues.create_subscription(settings)
    typer.echo(f"subscription {subscription} is there")


@subscriptions_app.command("rm")
@asks_edge("admin")
def subscriptions_rm(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    yes: YesOption = False,
) -> None:
    """Delete a subscription with everything it holds."""
    with edge.open(Queues) as queues:
        if not yes:
            held = queues.stats(subscription)
            count = sum(held[name] for name in ("ready", "leased", "delayed", "dead"))
            confirm(f"Delete {subscription} with {count} messages?")
        queues.delete_subscription(subscription)
    typer.echo(f"subscription {subscription} is deleted")


@queue_app.command()
@asks_edge("admin")
def seek(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    time: Annotated[str, typer.Option(help="now, 2026-12-24T18:00:00Z, or -90m from now.")] = "",
    sequence: Annotated[int, typer.Option(help="A number of the topic's log.", min=0)] = 0,
    snapshot: Annotated[str, typer.Option(help="A snapshot of the same topic.")] = "",
    yes: YesOption = False,
) -> None:
    """Set a subscription back, or be done with what it holds: `--time now` drops all that waits."""
    from services.cli.schedule import moment  # noqa: PLC0415 - see the module's docstring
    from services.runtime.errors import InvalidArgumentError  # noqa: PLC0415 - the same

    given = {"time": time, "sequence": str(sequence or ""), "snapshot": snapshot}
    target = {name: value for name, value in given.items() if value}
    if len(target) != 1:
        raise InvalidArgumentError("say one of --time, --sequence and --snapshot")
    if time:
        target["time"] = moment("+0s" if time == "now" else time)
    with edge.open(Queues) as queues:
        if not yes:
            confirm(f"Be done with what {subscription} holds from before?")
        queues.seek(subscription, target)
    typer.echo(f"{subscription} is set to {time or snapshot or sequence}")


@dlq_app.command("ls")
@asks_edge("admin")
def dlq_ls(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    reason: ReasonOption = "",
    source: FromOption = "",
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    with edge.open(Queues) as queues:
        found = queues.dead_letters(subscription, limit, _chosen(None, reason, source)["filter"])
    print_json(list(map(readable, found))) if as_json else queue_tables.dead_letters(found)


@dlq_app.command("get")
@asks_edge("admin")
def dlq_get(
    edge: Edge,
    subscription: SubscriptionArgument,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As `dlq ls` shows it.")],
) -> None:
    """Print a dead letter with its history, as JSON."""
    with edge.open(Queues) as queues:
        print_json(readable(queues.dead_letter(subscription, identifier)))


@dlq_app.command("stats")
@asks_edge("admin")
def dlq_stats(edge: Edge, subscription: SubscriptionArgument, *, as_json: JsonOption = False) -> None:
    """Count dead letters by reason, the most frequent first."""
    with edge.open(Queues) as queues:
        found = queues.dead_letter_stats(subscription)
    if as_json:
        print_json(found)
        return
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    queue_tables.dead_letter_stats(found)


@dlq_app.command("redrive")
@asks_edge("admin")
def dlq_redrive(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    ids: IdOption = None,
    reason: ReasonOption = "",
    source: FromOption = "",
    to: Annotated[str, typer.Option(help="To this topic instead of the subscription.")] = "",
    rate: Annotated[float, typer.Option(help="At most so many a second; 0 is all at once.", min=0)] = 0,
) -> None:
    """Deliver dead letters again."""
    with edge.open(Queues) as queues:
        count = queues.redrive(subscription, _chosen(ids, reason, source), to, rate)
    typer.echo(f"{count} delivered again")


@dlq_app.command("purge")
@asks_edge("admin")
def dlq_purge(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    ids: IdOption = None,
    reason: ReasonOption = "",
    source: FromOption = "",
    yes: YesOption = False,
) -> None:
    """Delete dead letters for good."""
    with edge.open(Queues) as queues:
        if not yes:
            which = "those chosen" if ids or reason or source else "all"
            confirm(f"Delete dead letters of {subscription}, {which}?")
        count = queues.purge(subscription, _chosen(ids, reason, source))
    typer.echo(f"{count} deleted")


def worker(
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the TaskApp is: `shop:app`.")],
    *,
    queue: Annotated[
        list[str] | None, typer.Option(help="Of this queue only; repeatable. Default: all of the app's.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", help="Tasks of a queue at once.", min=1, max=10_000)
    ] = 16,
    rate: Annotated[
        str,
        typer.Option(help="Tasks of a queue begun by this worker: 10/s, 30/m or 100/h. Default: no bound."),
    ] = "",
    drain: Annotated[str, typer.Option(help="How long running tasks may go on at the end.")] = "30s",
    state: StateOption = None,
) -> None:
    """Run the tasks of an app until Ctrl-C or SIGTERM, which lets running tasks finish."""
    from services.cli import worker as running  # noqa: PLC0415 - gRPC is slow to import
    from services.cli.durations import per_second, seconds  # noqa: PLC0415 - see the module's docstring

    def ready(app: Any, started: Any) -> None:
        typer.echo(
            f"{app.name}: {', '.join(sorted(app.tasks))}; queues {', '.join(started.queues)}", err=True
        )

    running.run(
        state_folder(state),
        target,
        queues=queue or (),
        concurrency=concurrency,
        drain_s=seconds(drain),
        per_second=per_second(rate) if rate else 0.0,
        ready=ready,
    )
