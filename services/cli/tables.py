"""Tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

_MIB = 1024 * 1024
_STYLES = {"serving": "green", "backoff": "red", "starting": "yellow", "stopping": "yellow"}
_HEADINGS = ("SERVICE", "STATE", "ADDRESS", "PID", "MEMORY", "UPTIME", "RESTARTS")
_RIGHT = {"PID", "MEMORY", "UPTIME", "RESTARTS"}
_COUNTS = {"READY", "LEASED", "DELAYED", "DEAD", "ATTEMPT", "ATTEMPTS", "UNDONE", "FIRED", "MISSED", "RUN"}
_WIDE = 10_000


def plain(text: str) -> str:
    """Text of others without what controls a terminal."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def show(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, as wide as it is: a name that is cut is of no use.

    Args:
        headings: Of the columns.
        rows: Cells; a `Text` keeps its style, anything else is data and no markup.
    """
    if not rows:
        Console(stderr=True).print("nothing there", style="dim")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _COUNTS else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain(str(cell))) for cell in row))
    Console(highlight=False, soft_wrap=True, width=_WIDE).print(table)


def status_table(answer: dict[str, Any]) -> None:
    """Print `plexus status`."""
    table = Table(box=None, header_style="bold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", no_wrap=True)
    notes = []
    for row in answer["services"]:
        style = _STYLES.get(row["state"], "")
        if row["state"] == "backoff":
            loop = "crash loop, " if row["crash_looping"] else ""
            notes.append(
                f"{row['service']}: {loop}{row['last_exit']}, starts again in {row['retry_in_s']:.0f} s; "
                f"see `plexus logs {row['service']}`"
            )
        if row["waits_for"]:
            notes.append(f"{row['service']} waits for {escape(row['waits_for'])}")
        table.add_row(
            row["service"],
            f"[{style}]{row['state']}[/{style}]" if style else row["state"],
            row["address"] or "",
            str(row["pid"] or ""),
            _memory(row["pss_bytes"]),
            _span(row["uptime_s"]),
            str(row["restarts"]),
        )
    own = answer["supervisor"]
    table.add_row(
        "supervisor", "", "", str(own["pid"]), _memory(own["pss_bytes"]), _span(own["uptime_s"]), ""
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(note, style="red")
    total = f"{answer['pss_bytes'] / _MIB:.0f} MiB"
    console.print(f"{answer['edge']}   {total}   {answer['state_dir']}", style="dim")


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / _MIB:.0f} MiB"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{whole}s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{whole:02}s"
