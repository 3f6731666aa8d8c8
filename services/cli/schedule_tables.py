"""Schedules for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from services.cli.schedule import short
from services.cli.tables import plain, show

_STYLES = {"active": "green", "paused": "yellow", "published": "green", "failed": "red", "missed": "yellow"}


def _state(value: str) -> Text:
    text = short(value)
    return Text(text, _STYLES.get(text, ""))


def when(schedule: dict[str, Any]) -> str:
    """When a schedule fires, in a few words."""
    if cron := schedule.get("cron"):
        return f"{cron['expression']} {cron.get('timeZone', '')}".strip()
    if every := schedule.get("every"):
        return f"every {every['interval']}"
    return f"at {schedule.get('at', '')}"


def schedules_table(schedules: list[dict[str, Any]]) -> None:
    """Print `plexus schedule ls`."""
    show(
        ("NAME", "TOPIC", "WHEN", "STATE", "NEXT", "FIRED", "MISSED", "ERROR"),
        [
            (
                each["name"],
                each["topic"],
                when(each),
                _state(each["state"]),
                each.get("nextFireTime", ""),
                each.get("firings", "0"),
                each.get("missed", "0"),
                each.get("lastError", ""),
            )
            for each in schedules
        ],
    )


def schedule_lines(schedule: dict[str, Any]) -> None:
    """Print `plexus schedule get`."""
    console = Console(highlight=False, soft_wrap=True)
    head = Text.assemble((schedule["name"], "bold"), f"  {when(schedule)}  ", _state(schedule["state"]))
    console.print(head)
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
            console.print(f"{name:<9}{value}", markup=False)
    if schedule.get("lastError"):
        console.print(plain(schedule["lastError"]), style="red", markup=False)


def runs_table(runs: list[dict[str, Any]]) -> None:
    """Print `plexus schedule runs`."""
    show(
        ("RUN", "DUE", "STATE", "ENDED", "MESSAGE", "ERROR"),
        [
            (
                run["number"],
                run["dueTime"] + (" (by hand)" if run.get("manual") else ""),
                _state(run["state"]),
                run.get("endTime", ""),
                run.get("messageId", ""),
                run.get("error", ""),
            )
            for run in runs
        ],
    )
