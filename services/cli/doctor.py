"""`plexus doctor`: what could be wrong on this machine, and the remedy."""

from __future__ import annotations

import datetime as dt
import importlib
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Any

from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_NEEDED_PYTHON = (3, 11)
_LOW_DISK_BYTES = 2 * 1024**3
_NO_DISK_BYTES = 256 * 1024**2
_EDGE_TIMEOUT_S = 3.0
_GIB = 1024**3


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Works, but look at it."""
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; `remedy` is empty when nothing is to be done."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


def examine(state_dir: Path, host: str, port: int) -> list[Finding]:
    """Run all checks; one that fails itself is a failure finding.

    Args:
        state_dir: The state folder.
        host: Where the edge listens or would listen.
        port: Its port.
    """
    findings: list[Finding] = []
    status = _status(state_dir)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "configuration": _configuration,
        "state folder": lambda: _state(state_dir),
        "models": lambda: _models(state_dir),
        "certificates": lambda: _certificates(state_dir),
        "processes": lambda: _processes(status),
        "edge": lambda: _edge(status, host, port),
    }
    for name, check in checks.items():
        try:
            findings.extend(check())
        except Exception as error:  # noqa: BLE001 - the other checks still say what they find
            findings.append(Finding(name, Level.FAILURE, f"check failed: {type(error).__name__}: {error}"))
    return findings


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Findings for programs."""
    healthy = all(finding.level is not Level.FAILURE for finding in findings)
    return {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}


def _status(state_dir: Path) -> dict[str, Any] | None:
    from services.cli import lifecycle  # noqa: PLC0415 - keeps this module's import cheap

    try:
        return lifecycle.status(state_dir)
    except PlexusError:
        return None


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _NEEDED_PYTHON:
        yield Finding("python", Level.FAILURE, found, "install Python 3.11 or newer")
    else:
        yield Finding("python", Level.OK, f"{found} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    needed = metadata.requires("plexus-mesh") or []
    names = [match[0] for text in needed if "extra ==" not in text and (match := re.match(r"[\w.-]+", text))]
    missing = []
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", Level.FAILURE, f"missing: {', '.join(missing)}", "run `make sync`")
    else:
        yield Finding("packages", Level.OK, f"{len(names)} installed")


def _configuration() -> Iterator[Finding]:
    from services.cli.explain import explain  # noqa: PLC0415 - imports every service's models

    try:
        rows = explain()
    except PlexusError as error:
        yield Finding(
            "configuration", Level.FAILURE, error.message, "correct it; `plexus config` checks again"
        )
        return
    changed = sum(row.source != "default" for row in rows)
    yield Finding("configuration", Level.OK, f"{len(rows)} values, {changed} set by you")


def _state(state_dir: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (state_dir, *state_dir.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            "state folder", Level.FAILURE, f"{existing} is not writable", "give another with --state"
        )
    elif state_dir.exists() and state_dir.stat().st_mode & 0o077:
        yield Finding(
            "state folder",
            Level.WARNING,
            f"{state_dir} can be entered by other users",
            f"chmod 700 {state_dir}",
        )
    else:
        yield Finding("state folder", Level.OK, str(state_dir))
    free = shutil.disk_usage(existing).free
    level = (
        Level.OK if free >= _LOW_DISK_BYTES else Level.WARNING if free >= _NO_DISK_BYTES else Level.FAILURE
    )
    remedy = "" if level is Level.OK else "free some space or move the state folder with --state"
    yield Finding("disk", level, f"{free / _GIB:.1f} GiB free", remedy)


def _models(state_dir: Path) -> Iterator[Finding]:
    from services.inference.models import MANIFEST, ModelStore  # noqa: PLC0415 - only here

    store = ModelStore(state_dir / "models")
    missing = [name for name in MANIFEST if not store.available(name)]
    if missing:
        yield Finding(
            "models", Level.WARNING, f"not fetched: {', '.join(missing)}", "run `plexus models pull`"
        )
    else:
        yield Finding("models", Level.OK, "fetched")


def _certificates(state_dir: Path) -> Iterator[Finding]:
    paths = sorted([*(state_dir / "ca").glob("ca.pem"), *(state_dir / "identities").glob("*/cert.pem")])
    if not paths:
        yield Finding("certificates", Level.OK, "none yet; the first start makes them")
        return
    from cryptography import x509  # noqa: PLC0415 - slow to import

    now = dt.datetime.now(dt.UTC)
    earliest: dt.datetime | None = None
    expired = []
    for path in paths:
        end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        if end <= now:
            expired.append(path.parent.name)
        elif earliest is None or end < earliest:
            earliest = end
    if expired:
        # Ordinary after a pause longer than their life: a start renews them.
        remedy = "`plexus up` renews them; if it runs, restart it"
        yield Finding("certificates", Level.WARNING, f"expired: {', '.join(expired)}", remedy)
    else:
        yield Finding("certificates", Level.OK, f"{len(paths)}, first expiry {earliest:%Y-%m-%d %H:%M} UTC")


def _processes(status: dict[str, Any] | None) -> Iterator[Finding]:
    if status is None:
        yield Finding("processes", Level.OK, "not running; start with `plexus up`")
        return
    bad = [row for row in status["services"] if row["state"] != "serving"]
    for row in bad:
        yield Finding(
            row["service"],
            Level.FAILURE,
            f"{row['state']}, last end: {row['last_exit'] or 'none'}",
            f"see `plexus logs {row['service']}`",
        )
    if not bad:
        yield Finding("processes", Level.OK, f"{len(status['services'])} serving")


def _edge(status: dict[str, Any] | None, host: str, port: int) -> Iterator[Finding]:
    if status is None:
        from services.cli.supervisor.rundir import check_http_port  # noqa: PLC0415 - only when nothing runs

        try:
            check_http_port(host, port)
        except PlexusError as error:
            yield Finding("port", Level.FAILURE, f"{port} is taken", error.message.partition(": ")[2])
        else:
            yield Finding("port", Level.OK, f"{port} is free")
        return
    httpx = importlib.import_module("httpx")
    url = f"{status['edge']}/healthz"
    try:
        answer = httpx.get(url, timeout=_EDGE_TIMEOUT_S)
    except httpx.HTTPError as error:
        detail = f"{url} does not answer: {error}"
        yield Finding("edge", Level.FAILURE, detail, "see `plexus logs edge`")
        return
    if answer.is_success:
        yield Finding("edge", Level.OK, f"{url} answers")
    else:
        yield Finding("edge", Level.FAILURE, f"{url} answers {answer.status_code}", "see `plexus logs edge`")
