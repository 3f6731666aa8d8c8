"""What the system says about running processes: sessions and memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PSS = re.compile(r"^Pss:\s+(\d+) kB$", re.MULTILINE)


def sessions() -> dict[int, list[int]]:
    """Pids by session; a supervised process leads its own, so this finds what it has started too."""
    found: dict[int, list[int]] = {}
    if not Path("/proc/self/stat").exists():
        return found
    for entry in os.listdir("/proc"):  # noqa: PTH208 - thousands of plain names
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue  # ended since the listing
        session = int(stat.rpartition(")")[2].split()[3])
        found.setdefault(session, []).append(int(entry))
    return found


def pss_bytes(pid: int) -> int | None:
    """Proportional set size of one process; None where the system does not tell."""
    try:
        match = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def session_pss_bytes(pid: int, by_session: dict[int, list[int]]) -> int | None:
    """Sum over a session; None if nothing is known."""
    sizes = [size for member in by_session.get(pid, [pid]) if (size := pss_bytes(member)) is not None]
    return sum(sizes) if sizes else None
