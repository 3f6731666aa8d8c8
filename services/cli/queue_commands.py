"""`plexus queue …`: arguments in, one function call, output out."""

from __future__ import annotations

import base64
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.edge import Edge, asks_edge
from services.cli.options import PRIORITIES, JsonOption, one_of, print_json
from services.cli.queue import Queues, overview, pairs, readable, span

if TYPE_CHECKING:
    from collections.abc import Iterator

queue_app = typer.Typer(help="Topics, subscriptions, messages, dead letters.", no_args_is_help=True)
topics_app = typer.Typer(help="Topics.", no_args_is_help=True)
subscriptions_app = typer.Typer(help="Subscriptions.", no_args_is_help=True)
dlq_app = typer.Typer(help="Dead letters of a subscription.", no_args_is_help=True)
queue_app.add_typer(topics_app, name="topics")
queue_app.add_typer(subscriptions_app, name="subscriptions")
queue_app.add_typer(dlq_app, name="dlq")

TopicArgument = Annotated[str, typer.Argument(help="Topic.")]
SubscriptionArgument = Annotated[str, typer.Argument(help="Subscription.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", help="At most this many.", min=1, max=1000)]
LabelOption = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for bookkeeping; repeatable.")]
ReasonOption = Annotated[str, typer.Option(help="Only those whose reason contains this.")]
FromOption = Annotated[str, typer.Option("--from", help="Only those published to this topic.")]
IdOption = Annotated[list[str] | None, typer.Option("--id", help="Only this one; repeatable.")]


def confirm(question: str) -> None:
    """Ask, and end the command unless the answer is yes.

    Raises:
        InvalidArgumentError: There is nobody to ask.
    """
    if not sys.stdin.isatty():
        from services.runtime.errors import InvalidArgumentError  # noqa: PLC0415 - see the module's docstring

        raise InvalidArgumentError(f"{question} Say --yes: there is nobody to ask")
    typer.confirm(question, abort=True, err=True)


@queue_app.command("ls")
@asks_edge("admin")
def ls(
    edge: Edge,
    topic: Annotated[str, typer.Option(help="Only subscriptions of this topic.")] = "",
    *,
    as_json: JsonOption = False,
) -> None:
    """List subscriptions with what they hold."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    with edge.open(Queues) as queues:
        rows = overview(queues, topic)
    print_json(rows) if as_json else queue_tables.stats(rows)


@queue_app.command()
@asks_edge("admin")
def stats(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    as_json: JsonOption = False,
) -> None:
    """Count what a subscription holds."""
    with edge.open(Queues) as queues:
        found = queues.stats(subscription)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(f"{name:<12}{value}")


@queue_app.command()
@asks_edge("admin")
def peek(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    limit: LimitOption = 10,
    as_json: JsonOption = False,
) -> None:
    """Show messages that wait; they are given back at once, and no attempt is counted."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    with (
        edge.open(Queues) as queues,
        queues.leased(subscription, limit) as deliveries,
    ):
        pass
    for each in deliveries:
        del each["ackId"]
    print_json(list(map(readable, deliveries))) if as_json else queue_tables.deliveries(deliveries)


@queue_app.command()
@asks_edge("admin")
def publish(
    edge: Edge,
    topic: TopicArgument,
    data: Annotated[list[str] | None, typer.Argument(help="Content; `-` reads it from the input.")] = None,
    *,
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", "-a", help="KEY=VALUE; repeatable.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the input is a message.")] = False,
    key: Annotated[str, typer.Option(help="Ordering key.")] = "",
    priority: Annotated[str, typer.Option(help="low, normal, high or critical.")] = "normal",
    delay: Annotated[str, typer.Option(help="Not delivered before: 90s, 15m, 1h or 7d.")] = "",
    ttl: Annotated[str, typer.Option(help="Given up after: 90s, 15m, 1h or 7d.")] = "",
    dedup_id: Annotated[str, typer.Option(help="The same within the window is stored once.")] = "",
    correlation_id: Annotated[str, typer.Option(help="Of the work that it belongs to.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Publish messages; prints their ids once they are durable."""
    from services.cli.durations import seconds  # noqa: PLC0415 - see the module's docstring

    common: dict[str, Any] = {
        "attributes": pairs(attribute or (), "--attribute"),
        "priority": f"PRIORITY_{one_of('priority', priority, PRIORITIES)}",
        "orderingKey": key,
        "dedupId": dedup_id,
        "correlationId": correlation_id,
    }
    common |= {name: span(seconds(text)) for name, text in (("delay", delay), ("ttl", ttl)) if text}
    ids: list[str] = []
    with edge.open(Queues) as queues:
        for batch in _batches(_contents(data or ["-"], lines=lines)):
            messages = [common | {"data": base64.b64encode(content).decode()} for content in batch]
            ids += queues.publish(topic, messages)
    print_json(ids) if as_json else typer.echo("\n".join(ids))


def _contents(data: list[str], *, lines: bool) -> Iterator[bytes]:
    for each in data:
        if each != "-":
            yield each.encode()
        elif lines:
            yield from (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
        else:
            yield sys.stdin.buffer.read()


def _batches(contents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for content in contents:
        if batch and (len(batch) == 500 or size + len(content) > 2**21):  # noqa: PLR2004 - well below bounds
            yield batch
            batch, size = [], 0
        batch.append(content)
        size += len(content)
    if batch:
        yield batch


@queue_app.command()
@asks_edge("admin")
def pull(
    edge: Edge,
    subscription: SubscriptionArgument,
    *,
    limit: LimitOption = 1,
    wait: Annotated[str, typer.Option(help="How long to wait for the first, up to 60s.")] = "0s",
    keep: Annotated[
        bool, typer.Option("--keep", help="Do not acknowledge: the lease runs, and its id is shown.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take messages out of a subscription and print them."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import
    from services.cli.durations import seconds  # noqa: PLC0415 - see the module's docstring

    with edge.open(Queues) as queues:
        deliveries = queues.pull(subscription, limit, seconds(wait))
        shown = [readable(each) for each in deliveries]
        if not keep:
            shown = [{key: value for key, value in each.items() if key != "ackId"} for each in shown]
        print_json(shown) if as_json or keep else queue_tables.deliveries(deliveries)
        sys.stdout.flush()
        if not keep:  # after they were written: a broken pipe loses nothing
            queues.acknowledge(subscription, deliveries)


@queue_app.command()
@asks_edge("admin")
def tail(
    edge: Edge,
    topic: TopicArgument,
    *,
    condition: Annotated[str, typer.Option("--filter", help='Only these: `attributes.kind = "a"`.')] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="End after so many; 0 is never.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one message a line.")] = False,
) -> None:
    """Follow a topic, or a pattern such as `orders.#`, from now on; nobody else's messages are touched."""
    from contextlib import closing  # noqa: PLC0415 - see the module's docstring

    from services.cli import queue_tables, signals  # noqa: PLC0415 - the same

    seen = 0
    with (
        edge.open(Queues) as queues,
        signals.as_interrupt(),
        closing(queues.tail(topic, condition)) as messages,
    ):
        for each in messages:
            if not each:
                typer.echo(f"following {topic}", err=True)
                continue
            del each["ackId"]
            text = json.dumps(readable(each), ensure_ascii=False) if as_json else queue_tables.line(each)
            typer.echo(text)
            sys.stdout.flush()
            seen += 1
            if seen == limit:
                return


# Topics.


@topics_app.command("ls")
@asks_edge("admin")
def topics_ls(
    edge: Edge,
    *,
    as_json: JsonOption = False,
) -> None:
    """List topics."""
    from services.cli import queue_tables  # noqa: PLC0415 - rich is slow to import

    with edge.open(Queues) as queues:
        found = queues.topics()
    if as_json:
        print_json(found)
        return
    queue_tables.topics(found)


@topics_app.command("create")
@asks_edge("admin")
def topics_create(
    edge: Edge,
    topic: TopicArgument,
    *,
    log: Annotated[bool, typer.Option("--log", help="Keep a log of what is published.")] = False,
    retention: Annotated[str, typer.Option(help="How long the log keeps it: 90s, 15m, 1h or 7d.")] = "",
    label: LabelOption = None,
) -> None:
    """Make a topic."""
    from services.cli.durations import seconds  # noqa: PLC0415 - see the module's docstring

    settings: dict[str, Any] = {"log": log, "labels": pairs(label or (), "--label")}
    if retention:
        settings["retention"] = span(seconds(retention))
    with edge.open(Queues) as queues:
        queues.create_topic(topic, settings)
    typer.echo(f"topic {topic} is there")


@topics_app.command("rm")
@asks_edge("admin")
def topics_rm(
    edge: Edge,
    topic: TopicArgument,
) -> None:
    """Delete a topic with its log; its subscriptions stay and deliver what they have."""
    with edge.open(Queues) as queues:
        queues.delete_topic(topic)
    typer.echo(f"topic {topic} is deleted")
