"""The supervisor's part of the state folder: `<state>/run` with lock, ports, logs and control socket."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import FailedPreconditionError

_MAX_SOCKET_PATH = 100  # sockaddr_un holds 104 bytes on macOS, 108 on Linux
_LOCK_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths below `<state>/run`."""

    state_dir: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.state_dir / "run"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        """Held by the supervisor and, until they end, by its children."""
        return self.path / "supervisor.lock"

    @property
    def ports(self) -> Path:
        """Ports chosen once for this state folder."""
        return self.path / "ports.json"

    @property
    def socket(self) -> Path:
        """The control socket; in a private temporary folder when the state folder's path is too long."""
        usual = self.path / "control.sock"
        if len(os.fsencode(usual.resolve())) <= _MAX_SOCKET_PATH:
            return usual
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"plexus-{os.getuid()}" / f"{digest}.sock"

    def create(self) -> None:
        """Make the folders, readable by their owner only."""
        for folder in (self.state_dir, self.path, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def log_file(self, name: str) -> Path:
        """The current log file of a process."""
        return self.logs / f"{name}.log"


def acquire_lock(run_dir: RunDir, wait_s: float) -> int:
    """Take the state folder.

    Children inherit the descriptor: the folder is free only when all processes of a supervisor have ended, so
    two engines never open the same files.

    Args:
        run_dir: Which.
        wait_s: How long the processes of an earlier run may take to end.

    Returns:
        The descriptor that holds the lock.

    Raises:
        FailedPreconditionError: It is in use.
    """
    descriptor = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise FailedPreconditionError(
                    f"Plexus already runs on {run_dir.state_dir} (pid {holder}): "
                    "`plexus down` first, or give another folder with --state",
                    reason="ALREADY_RUNNING",
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor


def is_locked(run_dir: RunDir) -> bool:
    """Whether a supervisor or a process of one still uses the folder."""
    try:
        descriptor = os.open(run_dir.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def hold_control_port(run_dir: RunDir) -> tuple[socket.socket, int]:
    """Bind the control plane's port without listening, so that nobody else gets it between two of its lives.

    The port is chosen free once and kept in ports.json. If someone else took it while Plexus was down, a new
    one is chosen.

    Returns:
        The bound socket, to keep open, and the port.
    """
    kept = 0
    try:
        kept = int(json.loads(run_dir.ports.read_text())["control"])
    except (OSError, ValueError, KeyError, TypeError):
        kept = 0  # absent or damaged: choose anew
    holder = _bind(kept) or _bind(0)
    if holder is None:
        raise FailedPreconditionError("no free TCP port on 127.0.0.1: close some connections and try again")
    port: int = holder.getsockname()[1]
    if port != kept:
        fresh = run_dir.ports.with_suffix(".new")
        fresh.write_text(json.dumps({"control": port}) + "\n")
        fresh.replace(run_dir.ports)
    return holder, port


def _bind(port: int) -> socket.socket | None:
    if port and not _is_free("127.0.0.1", port):
        return None
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", port))
    except OSError:
        holder.close()
        return None
    return holder


def _is_free(host: str, port: int) -> bool:
    """Whether nothing is bound to the port, with or without SO_REUSEPORT."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections do not count
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def check_http_port(host: str, port: int) -> None:
    """Refuse a port that someone else serves.

    Raises:
        FailedPreconditionError: With the remedy.
    """
    if port and not _is_free(host, port):
        raise FailedPreconditionError(
            f"port {port} is taken: choose another with --port, such as `plexus up --port {port + 1}`",
            reason="PORT_TAKEN",
        )
