"""Sagas for people."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.saga import short

_STYLES = {"stuck": "red", "succeeded": "green", "running": "cyan", "compensating": "yellow"}


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "ERROR")
    return table


def _state(value: str) -> str:
    text = short(value)
    style = _STYLES.get(text)
    return f"[{style}]{text}[/{style}]" if style else text


def sagas_table(sagas: list[dict[str, Any]]) -> None:
    """Print `plexus saga ls`."""
    table = _table("ID", "DEFINITION", "STATE", "STARTED", "ERROR")
    for saga in sagas:
        table.add_row(
            saga["id"],
            f"{saga['definition']} v{saga['version']}",
            _state(saga["state"]),
            saga["createTime"],
            escape(_error(saga)),
        )
    Console(highlight=False).print(table)


def definitions_table(definitions: list[dict[str, Any]]) -> None:
    """Print `plexus saga ls --definitions`."""
    table = _table("NAME", "VERSION", "CHANGED", "STEPS")
    for one in definitions:
        steps = " > ".join(step["name"] for step in one["steps"])
        table.add_row(one["name"], str(one["version"]), one["updateTime"], steps)
    Console(highlight=False).print(table)


def saga_table(saga: dict[str, Any]) -> None:
    """Print `plexus saga get`."""
    console = Console(highlight=False, soft_wrap=True)
    cause = short(saga.get("cause", ""))
    why = "" if cause in {"", "unspecified"} else f" ({cause})"
    console.print(f"{saga['id']}  {saga['definition']} v{saga['version']}  {_state(saga['state'])}{why}")
    if saga.get("errorCode"):
        console.print(_error(saga), style="red", markup=False)
    table = _table("STEP", "STATE", "ATTEMPTS", "UNDO", "RESULT", "ERROR")
    for step in saga["steps"]:
        table.add_row(
            step["name"],
            _state(step["state"]),
            str(step.get("attempts") or ""),
            str(step.get("compensationAttempts") or ""),
            escape(json.dumps(step["result"], ensure_ascii=False)[:60]) if "result" in step else "",
            escape(_error(step)),
        )
    console.print(table)


def event_line(event: dict[str, Any]) -> str:
    """One line of `plexus saga watch`."""
    step = event.get("step", "")
    undo = "undo " if event.get("compensation") else ""
    number = f" #{event['attempt']}" if event.get("attempt") else ""
    where = f"{undo}{step}{number}: " if step else ""
    error = _error(event)
    kind = short(event["type"]).replace("_", " ")
    return f"{event['revision']:>4}  {event['time']}  {where}{kind}{f'  {error}' if error else ''}"


def _error(value: dict[str, Any]) -> str:
    code, text = value.get("errorCode", ""), value.get("error", "")
    return f"{code}: {text}" if code else ""
