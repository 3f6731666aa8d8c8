"""Schedules for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.schedule import short

_WIDE = 400
_STYLES = {"active": "green", "paused": "yellow", "published": "green", "failed": "red", "missed": "yellow"}


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    # Without a terminal there is no width to keep to, and a cut name is of no use to a program.
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_WIDE)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in {"FIRED", "MISSED", "RUN"} else "left")
    return table


def _state(value: str) -> str:
    text = short(value)
    style = _STYLES.get(text)
    return f"[{style}]{text}[/{style}]" if style else text


def when(schedule: dict[str, Any]) -> str:
    """When a schedule fires, in a few words."""
    if cron := schedule.get("cron"):
        return f"{cron['expression']} {cron.get('timeZone', '')}".strip()
    if every := schedule.get("every"):
        return f"every {every['interval']}"
    return f"at {schedule.get('at', '')}"


def schedules_table(schedules: list[dict[str, Any]]) -> None:
    """Print `plexus schedule ls`."""
    table = _table("NAME", "TOPIC", "WHEN", "STATE", "NEXT", "FIRED", "MISSED", "ERROR")
    for each in schedules:
        table.add_row(
            each["name"],
            each["topic"],
            escape(when(each)),
            _state(each["state"]),
            each.get("nextFireTime", ""),
            each.get("firings", "0"),
            each.get("missed", "0"),
            escape(each.get("lastError", "")),
        )
    _console().print(table)


def schedule_lines(schedule: dict[str, Any]) -> None:
    """Print `plexus schedule get`."""
    console = _console()
    console.print(f"[bold]{schedule['name']}[/bold]  {escape(when(schedule))}  {_state(schedule['state'])}")
    facts = {
        "topic": schedule["topic"],
        "next": schedule.get("nextFireTime", "none"),
        "last": schedule.get("lastFireTime", "never"),
        "fired": schedule.get("firings", "0"),
        "missed": f"{schedule.get('missed', '0')} ({short(schedule['missedRuns'])})",
        "jitter": schedule.get("jitter", ""),
        "starts": schedule.get("startTime", ""),
        "ends": schedule.get("endTime", ""),
        "revision": schedule["revision"],
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name:<9}{escape(value)}")
    if schedule.get("lastError"):
        console.print(escape(schedule["lastError"]), style="red")


def runs_table(runs: list[dict[str, Any]]) -> None:
    """Print `plexus schedule runs`."""
    table = _table("RUN", "DUE", "STATE", "ENDED", "MESSAGE", "ERROR")
    for run in runs:
        table.add_row(
            run["number"],
            run["dueTime"] + (" (by hand)" if run.get("manual") else ""),
            _state(run["state"]),
            run.get("endTime", ""),
            run.get("messageId", ""),
            escape(run.get("error", "")),
        )
    _console().print(table)
