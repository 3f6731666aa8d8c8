"""The queueing service alone, in a process that a test may kill: no mesh, no TLS, any broker.

python -m tests.servers.queueing PORT FOLDER [AMQP_URL [STATE_URL]]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc.aio

from plexus.queueing.v1 import queueing_pb2_grpc
from services.cli.supervisor.backend import collect_seldom
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.servicer import QueueingServicer
from services.runtime.access import AllowAll
from services.runtime.config import ServerConfig, Settings, TelemetryConfig
from services.runtime.pipeline import Pipeline
from services.runtime.service import server_options
from services.runtime.telemetry import configure_logging
from tests.ports import free_port
from tests.queueing.rabbit import rabbit_broker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_READY_S = 100.0
_PING = "PLEXUS_SERVER__MIN_PING_INTERVAL_S"
_PROJECT = Path(__file__).resolve().parents[2]


def channel(target: str, more: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """A channel that finds its server again soon, with more arguments."""
    options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.initial_reconnect_backoff_ms", 100)]
    options += [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(target, options=[*options, *more])


class QueueingServer:
    """The process, on one port and folder for all its lives; use it with `with`."""

    def __init__(
        self, folder: Path, amqp_url: str = "", state_url: str = "", *, min_ping_interval_s: float = 10.0
    ) -> None:
        self.port = free_port()
        self._folder = folder
        self._arguments = [str(self.port), str(folder), *filter(None, [amqp_url, state_url])]
        self._environment = {_PING: str(min_ping_interval_s)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.servers.queueing", *self._arguments],
                cwd=_PROJECT,
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            written = (self._folder / "server.log").read_text()
            assert self._process.poll() is None, written
            assert time.monotonic() < deadline, written
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Stop it in its tracks."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def channel(self, more: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
        """A channel that finds it again soon, with more arguments."""
        return channel(f"127.0.0.1:{self.port}", more)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


async def _main(port: str, folder: str, amqp_url: str = "", state_url: str = "") -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    configure_logging("queueing", TelemetryConfig(log_level="warning"))
    path = Path(folder)
    opened = (
        rabbit_broker(amqp_url, state_url or path / "state.sqlite")
        if amqp_url
        else SqliteBroker(path / "queue.sqlite")
    )
    async with opened as broker, Calls(broker) as calls:
        config = Settings().section("server", ServerConfig)
        pipeline = Pipeline("queueing", config, AllowAll(), trusted_peer="cli")
        server = grpc.aio.server(interceptors=[pipeline], options=server_options(config))
        queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker, calls), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await stop.wait()
        await server.stop(5)


if __name__ == "__main__":
    collect_seldom()  # as every service does
    asyncio.run(_main(*sys.argv[1:]))
