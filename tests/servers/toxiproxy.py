"""A real toxiproxy: TCP proxies whose connections can be reset."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Self

import httpx

from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

READY_S = 60.0


class Toxiproxy:
    """One server of proxies, each on a port of its own. Use it with `with`; it is killed at the end."""

    def __init__(self, program: Path) -> None:
        """Set it up; nothing runs yet."""
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(timeout=30)

    def __enter__(self) -> Self:
        port = free_port()
        command = [str(self._program), "-host", "127.0.0.1", "-port", str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._http.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                self._http.get("/version").raise_for_status()
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError("toxiproxy did not start")
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def proxy(self, name: str, port: int) -> int:
        """Make a proxy of a port of this machine; the port to connect to instead."""
        wanted = {"name": name, "listen": "127.0.0.1:0", "upstream": f"127.0.0.1:{port}", "enabled": True}
        made = self._http.post("/proxies", json=wanted).raise_for_status().json()
        return int(made["listen"].rpartition(":")[2])

    def reset(self, name: str) -> None:
        """Reset a proxy's connections, and each that is made until `heal`, as a failing network does."""
        for stream in ("upstream", "downstream"):
            toxic = {"name": stream, "type": "reset_peer", "stream": stream, "attributes": {"timeout": 0}}
            self._http.post(f"/proxies/{name}/toxics", json=toxic).raise_for_status()

    def heal(self, name: str) -> None:
        """Let connections through again."""
        for stream in ("upstream", "downstream"):
            self._http.delete(f"/proxies/{name}/toxics/{stream}").raise_for_status()
