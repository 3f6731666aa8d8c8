"""Queues as people read them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from services.cli.queue import readable
from services.cli.tables import plain, show

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 60


def content(message: dict[str, Any]) -> str:
    """The beginning of a message's content in one line."""
    shown = readable(message)
    text = shown.get("data", shown.get("dataBase64", ""))
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def attributes(message: dict[str, Any]) -> str:
    """A message's labels in one line."""
    return " ".join(f"{key}={value}" for key, value in sorted(message.get("attributes", {}).items()))


def time(message: dict[str, Any], field: str) -> str:
    """A time to the second."""
    return str(message.get(field, ""))[:19].replace("T", " ")


def topics(found: Sequence[dict[str, Any]]) -> None:
    """Print topics."""
    rows = [
        (each["name"], each.get("retention", "") if each.get("log") else "", time(each, "createTime"))
        for each in found
    ]
    show(("TOPIC", "LOG KEPT", "CREATED"), rows)


def subscriptions(found: Sequence[dict[str, Any]]) -> None:
    """Print subscriptions with their settings."""
    rows = [
        (
            each["name"],
            each["topic"],
            each.get("ackDeadline", ""),
            each.get("retry", {}).get("maxAttempts", ""),
            " ".join(name for name in ("ordered", "exclusive", "detached") if each.get(name)),
            each.get("filter", ""),
            each.get("deadLetterTopic", ""),
        )
        for each in found
    ]
    show(("SUBSCRIPTION", "TOPIC", "LEASE", "ATTEMPTS", "IS", "FILTER", "DEAD LETTERS TO"), rows)


def stats(rows: Sequence[dict[str, Any]]) -> None:
    """Print subscriptions with counts."""
    headings = ("SUBSCRIPTION", "TOPIC", "READY", "LEASED", "DELAYED", "DEAD", "OLDEST")
    show(
        headings,
        [
            (
                *(row["subscription"], row["topic"]),
                ("≤ " if int(row.get("unexamined", 0)) else "") + str(row["ready"]),
                *(row["leased"], row["delayed"], row["dead"], time(row, "oldestTime")),
            )
            for row in rows
        ],
    )


def deliveries(messages: Sequence[dict[str, Any]]) -> None:
    """Print messages."""
    headings = ("MESSAGE", "PUBLISHED", "ATTEMPT", "KEY", "CONTENT", "ATTRIBUTES")
    show(
        headings,
        [
            (
                each["messageId"],
                time(each, "publishTime"),
                each.get("attempt", 1),
                each.get("orderingKey", ""),
                content(each),
                attributes(each),
            )
            for each in messages
        ],
    )


def dead_letters(letters: Sequence[dict[str, Any]]) -> None:
    """Print dead letters."""
    headings = ("ID", "DIED", "ATTEMPTS", "TOPIC", "REASON", "CONTENT")
    show(
        headings,
        [
            (
                each["id"],
                time(each, "deadTime"),
                each.get("attempts", 0),
                each["topic"],
                each.get("reason", "")[:_SHOWN],
                content(each),
            )
            for each in letters
        ],
    )


def dead_letter_stats(found: dict[str, Any]) -> None:
    """Print how many dead letters have which reason."""
    ordered = sorted(found["reasons"].items(), key=lambda pair: (-pair[1], pair[0]))
    show(("COUNT", "REASON"), [(count, reason) for reason, count in ordered])


def line(message: dict[str, Any]) -> str:
    """A message of `tail`; for a terminal without what controls it."""
    text = "  ".join(filter(None, (time(message, "publishTime"), content(message), attributes(message))))
    return plain(text) if sys.stdout.isatty() else text
