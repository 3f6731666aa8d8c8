"""Once installed, nothing needs a network: the demo runs on a machine that has none but its own loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.e2e.backend import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# In a network namespace of its own: brings loopback up, shows that nothing else is there, becomes the demo.
_ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
assert [name for _, name in socket.if_nameindex()] == ["lo"], socket.if_nameindex()
try:
    socket.create_connection(("192.0.2.1", 443), timeout=5)
except OSError as error:
    print("unplugged:", error, flush=True)
else:
    sys.exit("there is a network")
os.execv(sys.executable, [sys.executable, "examples/demo.py", "--state", sys.argv[1]])
"""


def test_the_demo_runs_with_the_network_unplugged(tmp_path: Path, models: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], check=False).returncode != 0:
        pytest.skip("a machine without a network is a network namespace, and making one needs root")
    (tmp_path / "models").symlink_to(models, target_is_directory=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _ALONE, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unplugged:" in done.stdout
    assert done.stdout.count("; cites ") == 3
