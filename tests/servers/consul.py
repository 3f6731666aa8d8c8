"""A real Consul agent under a test's control: start, kill, stop in its tracks, wipe."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

READY_S = 90.0
"""A single server elects itself within about 8 s; ten times that for a busy machine."""


class ConsulAgent:
    """One agent: a server of its own, or a client of another.

    Use it with `with`; it starts there and is killed at the end.
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        *,
        name: str = "server",
        join: ConsulAgent | None = None,
        config: dict[str, Any] | None = None,
        token: str = "",
    ) -> None:
        """Set it up; nothing runs yet.

        Args:
            program: The `consul` binary.
            folder: For its data, configuration and log.
            name: Of the node.
            join: The server to join as a client agent; None makes a server.
            config: Added to the configuration, or put in place of parts of it.
            token: Sent by `http` and with the readiness checks.
        """
        self._program = program
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self._server = join is None
        self._process: subprocess.Popen[bytes] | None = None
        self.name = name
        self.token = token
        self.ports = {kind: free_port() for kind in ("http", "grpc", "dns", "serf_lan", "server")}
        self._ports = {"https": -1, "grpc_tls": -1, "serf_wan": -1, **self.ports}
        base: dict[str, Any] = {
            "node_name": name,
            "data_dir": str(self._folder / "data"),
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "datacenter": "dc1",
            "server": self._server,
            "ports": self._ports,
            "connect": {"enabled": True},
            "disable_update_check": True,
            "performance": {"raft_multiplier": 1},
            "limits": {"http_max_conns_per_client": 2000},
        }
        if join is None:
            base |= {"bootstrap_expect": 1, "ui_config": {"enabled": True}}
        else:
            base["retry_join"] = [f"127.0.0.1:{join.ports['serf_lan']}"]
        self.config = base | (config or {})

    @property
    def url(self) -> str:
        """Of its HTTP API."""
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        """Of its gRPC API, host:port."""
        return f"127.0.0.1:{self.ports['grpc']}"

    def http(self) -> httpx.Client:
        """A client of ours beside the one under test, with the agent's token."""
        headers = {"X-Consul-Token": self.token} if self.token else {}
        return httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=30)

    def start(self) -> None:
        """Start it and wait until it answers with a leader known, and serves Connect if it is a server."""
        file = self._folder / "config.json"
        file.write_text(json.dumps(self.config))
        with (self._folder / "consul.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "agent", f"-config-file={file}"], stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + READY_S
        with self.http() as http:
            while not self._is_ready(http):
                assert self._process is None or self._process.poll() is None, f"ended\n{self.log_tail()}"
                assert time.monotonic() < deadline, f"not ready in {READY_S} s\n{self.log_tail()}"
                time.sleep(0.05)

    def _is_ready(self, http: httpx.Client) -> bool:
        try:
            if http.get("/status/leader").json() == "":
                return False
            # Before it has replayed its log, a server drops writes that equal what it knew then.
            http.get("/catalog/nodes", params={"consistent": ""}).raise_for_status()
            # The roots need no rights, the registration of the node itself does, so it may stay invisible.
            return bool(http.get("/connect/ca/roots").raise_for_status().json()["Roots"])
        except (httpx.HTTPError, ValueError, KeyError):
            return False

    def kill(self) -> None:
        """End it as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop it in its tracks: connections stay, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Forget everything it stored; only while it does not run."""
        assert self._process is None
        shutil.rmtree(self._folder / "data")

    def log_tail(self) -> str:
        """The last lines it wrote."""
        return "\n".join(self.log().splitlines()[-25:])

    def log(self) -> str:
        """All that it wrote."""
        return (self._folder / "consul.log").read_text(errors="replace")

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
