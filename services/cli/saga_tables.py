"""Sagas for people."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from services.cli.saga import short
from services.cli.tables import plain, show

_STYLES = {"stuck": "red", "succeeded": "green", "running": "cyan", "compensating": "yellow"}
_SHOWN = 60


def _state(value: str) -> Text:
    text = short(value)
    return Text(text, _STYLES.get(text, ""))


def sagas_table(sagas: list[dict[str, Any]]) -> None:
    """Print `plexus saga ls`."""
    show(
        ("ID", "DEFINITION", "STATE", "STARTED", "ERROR"),
        [
            (
                saga["id"],
                f"{saga['definition']} v{saga['version']}",
                _state(saga["state"]),
                saga["createTime"],
                _error(saga),
            )
            for saga in sagas
        ],
    )


def definitions_table(definitions: list[dict[str, Any]]) -> None:
    """Print `plexus saga ls --definitions`."""
    show(
        ("NAME", "VERSION", "CHANGED", "STEPS"),
        [
            (
                one["name"],
                one["version"],
                one["updateTime"],
                " > ".join(step["name"] for step in one["steps"]),
            )
            for one in definitions
        ],
    )


def saga_table(saga: dict[str, Any]) -> None:
    """Print `plexus saga get`."""
    console = Console(highlight=False, soft_wrap=True)
    cause = short(saga.get("cause", ""))
    why = "" if cause in {"", "unspecified"} else f" ({cause})"
    console.print(
        Text(f"{saga['id']}  {saga['definition']} v{saga['version']}  ") + _state(saga["state"]) + why
    )
    if saga.get("errorCode"):
        console.print(plain(_error(saga)), style="red", markup=False)
    show(
        ("STEP", "STATE", "ATTEMPTS", "UNDONE", "RESULT", "ERROR"),
        [
            (
                step["name"],
                _state(step["state"]),
                step.get("attempts") or "",
                step.get("compensationAttempts") or "",
                json.dumps(step["result"], ensure_ascii=False)[:_SHOWN] if "result" in step else "",
                _error(step),
            )
            for step in saga["steps"]
        ],
    )


def event_line(event: dict[str, Any]) -> str:
    """One line of `plexus saga watch`."""
    step = event.get("step", "")
    undo = "undo " if event.get("compensation") else ""
    number = f" #{event['attempt']}" if event.get("attempt") else ""
    where = f"{undo}{step}{number}: " if step else ""
    error = _error(event)
    kind = short(event["type"]).replace("_", " ")
    return plain(f"{event['revision']:>4}  {event['time']}  {where}{kind}{f'  {error}' if error else ''}")


def _error(value: dict[str, Any]) -> str:
    code, text = value.get("errorCode", ""), value.get("error", "")
    return f"{code}: {text}" if code else ""
