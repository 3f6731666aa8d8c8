"""Several hosts on one machine: network namespaces joined by a bridge, each with an address of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NETWORK = "10.77.0"


@dataclass(frozen=True, slots=True)
class Host:
    """A host.

    Attributes:
        namespace: The network namespace.
        address: Its IP address.
    """

    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs a program there."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program there; it dies with this process."""
        guarded = ["setpriv", "--pdeathsig", "KILL", *arguments]
        return subprocess.Popen(self.command(*guarded), **options)

    def run(self, *arguments: str, timeout_s: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program there to its end."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **options,
        )

    def unplug(self) -> None:
        """Pull its cable."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Put it back."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Sequence[Host]]:
    """Hosts that reach each other, and nothing else; skips where this user may not make them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("hosts are network namespaces: they need root and iproute2 (apt-get install iproute2)")
    tag = f"plx{secrets.token_hex(3)}"
    switch = f"{tag}-switch"
    made: list[str] = []
    try:
        _ip("netns", "add", switch)
        made.append(switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        found = []
        for number in range(1, count + 1):
            host = Host(f"{tag}-{number}", f"{NETWORK}.{number}")
            _ip("netns", "add", host.namespace)
            made.append(host.namespace)
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            found.append(host)
        yield found
    finally:
        for namespace in reversed(made):
            _ip("netns", "del", namespace)
