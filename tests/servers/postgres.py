"""A real PostgreSQL under a test's control, with a database for each test."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit, urlunsplit

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

READY_S = 110.0
"""A server is up in about a second; much more for a busy machine."""
USER = "plexus"


class PostgresServer:
    """One server with a folder and a port of its own, as an unprivileged user.

    Use it with `with`; it starts there and is killed at the end.
    """

    def __init__(self, program: Path) -> None:
        """Set it up; nothing runs yet.

        Args:
            program: Debian's `postgres`.
        """
        self._programs = program.parent
        self._process: subprocess.Popen[bytes] | None = None
        self._password = secrets.token_urlsafe(16)
        # Not one of pytest's folders: those are closed to the user that the server runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="plexus-postgres-"))
        self.port = free_port()
        self._url = f"postgresql://{USER}:{self._password}@127.0.0.1:{self.port}/postgres"

    @classmethod
    def at(cls, url: str) -> Self:
        """A server that runs already; `url` is that of a database whose user may make others."""
        server = cls.__new__(cls)
        server._process = None
        server._url = url
        server._programs = Path(shutil.which("psql") or "psql").parent
        server.port = urlsplit(url).port or 5432
        return server

    def url(self, database: str) -> str:
        """Where clients connect."""
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def sql(self, statement: str, database: str = "") -> str:
        """Run a statement as its superuser; what it printed, columns apart by `|`."""
        url = self.url(database) if database else self._url
        done = subprocess.run(
            [self._programs / "psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-qAt", "-c", statement, url],
            check=True,
            capture_output=True,
            text=True,
            timeout=READY_S,
        )
        return done.stdout.strip()

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """A fresh database, dropped at the end; its URL."""
        name = f"test_{secrets.token_hex(6)}"
        self.sql(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    @staticmethod
    def _unprivileged() -> list[str]:
        """What runs a program as Debian's user for it; PostgreSQL refuses to be root's.

        Not Popen's own `user`, which forks in Python: a process that has used gRPC does not survive that.
        """
        identity = ("--reuid", "postgres", "--regid", "postgres", "--clear-groups")
        return ["setpriv", *identity] if os.getuid() == 0 else []

    def _make(self) -> None:
        if self._unprivileged():
            shutil.chown(self._folder, "postgres", "postgres")
        password = self._folder / "password"
        password.write_text(self._password)
        subprocess.run(
            [
                *self._unprivileged(),
                *(self._programs / "initdb", "--pgdata", self._folder / "data", "--username", USER),
                *("--auth", "scram-sha-256", "--pwfile", password, "--no-sync", "--encoding", "UTF8"),
                "--no-locale",
            ],
            check=True,
            capture_output=True,
            timeout=READY_S,
            cwd=self._folder,
        )

    def start(self) -> None:
        """Start it, made if need be, and wait until it serves."""
        if not (self._folder / "data").exists():
            self._make()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            # The loss of power is not among the tests; what is written survives kill -9 without.
            "fsync": "off",
            "max_connections": "60",
            "shared_buffers": "32MB",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (self._folder / "out.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._unprivileged(), self._programs / "postgres", "-D", self._folder / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.sql("SELECT 1")
                return
            assert self._process.poll() is None, f"ended\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"not ready in {READY_S} s\n{self.log_tail()}"
            time.sleep(0.05)

    def log_tail(self) -> str:
        """The last lines it wrote."""
        return "\n".join((self._folder / "out.log").read_text(errors="replace").splitlines()[-25:])

    def kill(self) -> None:
        """End it as kill -9 does, and every process that it made."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGSTOP)  # it makes no more
            # Each of its children is a session of its own, so that no group has them all.
            ending = _descendants(process.pid)
            for child in ending:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.wait()
            # While one is left, with the shared memory, none can be started on the same data.
            deadline = time.monotonic() + READY_S
            while any(map(_lives, ending)):
                assert time.monotonic() < deadline, f"{ending} do not end"
                time.sleep(0.01)

    def pause(self) -> None:
        """Stop it in its tracks: connections stay, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        for child in _descendants(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in {"Z", "X"}
    return False


def _descendants(pid: int) -> list[int]:
    """A process and its children, which of PostgreSQL's are all there are."""
    with contextlib.suppress(OSError):  # it ended by itself
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, text.split())]
    return []
