"""What the system says about running processes: memory and listening addresses."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LISTEN = "0A"
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


def listening(pid: int) -> list[str]:
    """Loopback TCP addresses on which a process listens, as host:port, in descriptor order."""
    inodes: dict[str, int] = {}
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = link.readlink().name if link.is_symlink() else ""
            if target.startswith("socket:["):
                inodes[target[8:-1]] = int(link.name)
    except OSError:
        return []
    rows: list[tuple[int, str]] = []
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                rows.append((inodes[fields[9]], f"127.0.0.1:{int(fields[1].rpartition(':')[2], 16)}"))
    return [address for _, address in sorted(rows)]
