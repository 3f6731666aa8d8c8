"""Children's output: rotated files, and prefixed lines on the console."""

from __future__ import annotations

import json
import os
import select
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINE_BYTES = 64 * 1024
"""A longer line is cut into several."""
_COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_SHOWN_FIRST = ("timestamp", "level", "event", "service", "request_id", "trace_id")


class RotatingFile:
    """An append-only log that keeps its last few files: name.log, name.log.1, name.log.2."""

    def __init__(self, path: Path, *, max_bytes: int = 8 * 1024 * 1024, keep: int = 2) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            OSError: The disk refuses; the next write tries again.
        """
        if self._fd >= 0 and self._size + len(data) > self._max_bytes:
            self._rotate()
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        self._size += os.write(self._fd, data)

    def _rotate(self) -> None:
        self.close()
        for number in range(self._keep, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)

    @property
    def descriptor(self) -> int:
        """The open file's descriptor; -1 when none is open."""
        return self._fd

    def close(self) -> None:
        """Close; a later write opens again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LineBuffer:
    """Cuts a byte stream into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines completed by `data`, without their ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]
        return lines

    def end(self) -> list[bytes]:
        """Return what is left."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def readable(line: str) -> str:
    """A JSON log line as `time level event key=value`; any other line unchanged."""
    if not line.startswith("{"):
        return line
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    if not isinstance(fields, dict) or "event" not in fields:
        return line
    time = str(fields.get("timestamp", ""))[11:19]
    rest = " ".join(f"{key}={value}" for key, value in fields.items() if key not in _SHOWN_FIRST)
    return " ".join(
        part for part in (time, f"{fields.get('level', ''):<7}", str(fields["event"]), rest) if part
    )


class Console:
    """Prefixed lines on a stream; never waits for a reader that has stopped reading.

    Args:
        stream: Where to; None shows nothing.
        names: All names, for the width and the colours of the prefix.
    """

    def __init__(self, stream: IO[str] | None, names: list[str]) -> None:
        self._fd = stream.fileno() if stream is not None else -1
        self._tty = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
        self._width = max(map(len, names), default=0)
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        self._dropped = 0
        self._poll = select.poll()
        if self._fd >= 0:
            self._poll.register(self._fd, select.POLLOUT)

    def line(self, name: str, text: str) -> None:
        """Show one line, or drop it if the reader does not keep up."""
        if self._fd < 0:
            return
        writable = any(event & select.POLLOUT for _, event in self._poll.poll(0))
        if not writable:
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._put("plexus", f"{dropped} lines not shown: see `plexus logs`")
        self._put(name, readable(text) if self._tty else text)

    def _put(self, name: str, text: str) -> None:
        prefix = f"{name:<{self._width}} | "
        if self._tty:
            prefix = f"\x1b[{self._colours.get(name, 37)}m{prefix}\x1b[0m"
        # Up to PIPE_BUF bytes a write to a writable pipe does not block.
        data = (prefix + text).encode(errors="replace")[: select.PIPE_BUF - 1] + b"\n"
        try:
            os.write(self._fd, data)
        except OSError:
            self._dropped += 1  # a closed terminal must not end the backend
