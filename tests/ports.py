"""Ports for programs that cannot bind port 0 themselves."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

# Below the ephemeral range of Linux (32768 and up): no outgoing connection ever takes one of these.
_RANGE = range(20000, 32000)
_held: list[IO[str]] = []


def free_port() -> int:
    """A TCP port that nothing listens on and that no other caller gets while this process lives."""
    locks = Path(tempfile.gettempdir()) / f"plexus-test-ports-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(_RANGE, 500):
        lock = (locks / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                probe.bind(("127.0.0.1", port))
                datagrams.bind(("127.0.0.1", port))  # Consul's gossip and DNS want both
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError("no free port in the range of tests")
