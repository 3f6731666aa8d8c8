"""The supervisor's part of the state folder: `<state>/run` with lock, ports, logs and control socket."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import FailedPreconditionError

_MAX_SOCKET_PATH = 100  # sockaddr_un holds 104 bytes on macOS, 108 on Linux
_LOCK_POLL_S = 0.1
_FIRST_PORT = 20_000  # below it live many well-known services
_MAX_PORT = 65_535
_ATTEMPTS = 200


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


def control_port(run_dir: RunDir) -> int:
    """The control plane's port, chosen free once and kept in ports.json.

    It lies outside the range from which the system gives ports to connections and to servers that ask for
    any: nobody gets it by chance while the control plane is down or between two of its lives. If someone took
    it on purpose while Plexus was down, a new one is chosen.

    Raises:
        FailedPreconditionError: No port is free.
    """
    try:
        kept = int(json.loads(run_dir.ports.read_text())["control"])
    except (OSError, ValueError, KeyError, TypeError):
        kept = 0  # absent or damaged: choose anew
    if 0 < kept <= _MAX_PORT and _is_free("127.0.0.1", kept):
        return kept
    candidates = _unassigned_ports()
    for port in random.sample(candidates, min(_ATTEMPTS, len(candidates))):
        if _is_free("127.0.0.1", port):
            fresh = run_dir.ports.with_suffix(".new")
            fresh.write_text(json.dumps({"control": port}) + "\n")
            fresh.replace(run_dir.ports)
            return port
    raise FailedPreconditionError("no free TCP port on 127.0.0.1: close some connections and try again")


def _unassigned_ports() -> range:
    """Ports that the system never gives out by itself; all unprivileged ones if there is no such range."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = 49152, _MAX_PORT  # the IANA range, which other systems use
    if low - _FIRST_PORT >= _ATTEMPTS:
        return range(_FIRST_PORT, low)
    if _MAX_PORT - high >= _ATTEMPTS:
        return range(high + 1, _MAX_PORT + 1)
    return range(_FIRST_PORT, _MAX_PORT + 1)


def _is_free(host: str, port: int) -> bool:
    """Whether a server could bind the port now."""
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
