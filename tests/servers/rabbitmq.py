"""A real RabbitMQ node under a test's control, with a virtual host for each test."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import httpx

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

READY_S = 110.0
"""A node is up in about 10 s; ten times that for a busy machine."""
_PROJECT = Path(__file__).resolve().parents[2]


class RabbitServer:
    """One node with a name, folder, cookie, port mapper and ports of its own.

    Use it with `with`; it starts there and is killed at the end.
    """

    def __init__(self, program: Path, folder: Path) -> None:
        """Set it up; nothing runs yet.

        Args:
            program: Debian's `rabbitmq-server`.
            folder: For its data, configuration and log.
        """
        self._program = program
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.management = f"http://guest:guest@127.0.0.1:{free_port()}"
        self._distribution, self._mapper, self._stream = free_port(), free_port(), free_port()
        self._node = f"plexus-{secrets.token_hex(4)}@localhost"
        self._cookie = secrets.token_hex(16)

    @classmethod
    def at(cls, management: str) -> Self:
        """A server that runs already; `management` is the URL of its API, credentials included."""
        server = cls.__new__(cls)
        server._processes = []
        server.management = management.rstrip("/")
        with server.http() as http:
            listeners = http.get("/overview").json()["listeners"]
        server.port = next(entry["port"] for entry in listeners if entry["protocol"] == "amqp")
        return server

    def http(self) -> httpx.Client:
        """A client of the management API."""
        return httpx.Client(base_url=f"{self.management}/api", timeout=30)

    def url(self, vhost: str) -> str:
        """Where AMQP clients connect."""
        parts = urlsplit(self.management)
        return f"amqp://{parts.username}:{parts.password}@{parts.hostname}:{self.port}/{vhost}"

    @contextlib.contextmanager
    def vhost(self) -> Iterator[str]:
        """A fresh virtual host, deleted at the end; its name."""
        name = f"test-{secrets.token_hex(6)}"
        with self.http() as http:
            http.put(f"/vhosts/{name}").raise_for_status()
            try:
                yield name
            finally:
                http.delete(f"/vhosts/{name}")

    def control(self, *arguments: str) -> None:
        """Run rabbitmqctl against the node."""
        command = [str(self._program.with_name("rabbitmqctl")), "--node", self._node, *arguments]
        subprocess.run(command, env=self._environment(), check=True, timeout=READY_S, capture_output=True)

    def settle(self) -> None:
        """Write down which queues there are, as the server does by itself twice a second.

        A queue declared later than that before a kill -9 does not come back.
        """
        self.control("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.begin()
        self.wait_ready()

    def begin(self) -> None:
        """Start it."""
        configuration = self._folder / "rabbitmq.conf"
        configuration.write_text(self._configuration())
        environment = self._environment() | {"RABBITMQ_CONFIG_FILE": str(configuration)}
        with (self._folder / "out.log").open("ab") as log:
            for command in (["epmd", "-port", str(self._mapper)], [str(self._program)]):
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        cwd=self._folder,
                        start_new_session=True,
                    )
                )

    def _configuration(self) -> str:
        """What rabbitmq.conf has."""
        port = urlsplit(self.management).port
        return (
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n"
            f"stream.listeners.tcp.1 = 127.0.0.1:{self._stream}\n"
            "disk_free_limit.absolute = 50MB\n"
        )

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_ERLANG_COOKIE": self._cookie,
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(_PROJECT / "rabbitmq" / "enabled_plugins"),
            # Idle schedulers that spin would take the tests' processors.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-setcookie {self._cookie} +S 2:2 +sbwt none",
        }

    def wait_ready(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + READY_S
        with self.http() as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if http.get(f"/health/checks/port-listener/{self.port}").status_code == httpx.codes.OK:
                        return
                ended = self._processes[-1].poll() is not None
                assert not ended, f"ended\n{self.log_tail()}"
                assert time.monotonic() < deadline, f"not ready in {READY_S} s\n{self.log_tail()}"
                time.sleep(0.1)

    def log_tail(self) -> str:
        """The last lines it wrote."""
        return "\n".join((self._folder / "out.log").read_text(errors="replace").splitlines()[-25:])

    def kill(self) -> None:
        """End it as kill -9 does."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = []

    def pause(self) -> None:
        """Stop it in its tracks: connections stay, nothing answers."""
        os.killpg(self._processes[-1].pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self._processes[-1].pid, signal.SIGCONT)

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
