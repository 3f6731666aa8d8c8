"""Broker, service and consumers as processes that can be broken, with proxies between them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from benchmarks.broker.plan import KILL, RESET, STOP, Fault
from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub as Stub
from tests.servers.programs import RABBITMQ, TOXIPROXY
from tests.servers.queueing import QueueingServer, channel
from tests.servers.rabbitmq import RabbitServer
from tests.servers.toxiproxy import Toxiproxy

if TYPE_CHECKING:
    from types import TracebackType

_PROJECT = Path(__file__).resolve().parents[2]


class ConsumerProcess:
    """Consumes a subscription, and writes each line of its ledger before it acknowledges.

    Attributes:
        works: Whether it has written something since it was started.
    """

    def __init__(self, target: str, file: Path, subscription: str, *more: str) -> None:
        """Set it up; nothing runs yet."""
        self._command = [
            *(sys.executable, "-m", "benchmarks.broker.consumer", "--target", target),
            *("--file", str(file), "--subscription", subscription, *more),
        ]
        self._file = file
        self._read = 0
        self.works = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(  # noqa: S603 - our own
            self._command, stdin=subprocess.DEVNULL, cwd=_PROJECT
        )

    def kill(self) -> None:
        """End it as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.works = False

    def pause(self) -> None:
        """Stop it in its tracks."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def news(self) -> list[dict[str, Any]]:
        """What it wrote since the last time."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        self.works = self.works or bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Stage:
    """Everything there is of one backend; open it with `async with`.

    Attributes:
        stub: Of the service, through a proxy.
        service: Its process.
        consumers: Started by `employ`.
    """

    stub: Stub
    service: QueueingServer

    def __init__(self, folder: Path, *, broker: bool) -> None:
        """Set it up.

        Args:
            folder: For everything's state.
            broker: Whether RabbitMQ carries the messages.
        """
        self._folder = folder
        self._broker = broker
        self._stack = AsyncExitStack()
        self._rabbit: RabbitServer | None = None
        self.consumers: list[ConsumerProcess] = []
        self.target = ""

    async def __aenter__(self) -> Self:
        """Start servers and service."""
        async with AsyncExitStack() as stack:
            url = ""
            for name in ("service", "rabbitmq"):
                await asyncio.to_thread((self._folder / name).mkdir, parents=True)
            self._proxies = stack.enter_context(Toxiproxy(await asyncio.to_thread(TOXIPROXY.provide)))
            if self._broker:
                program = await asyncio.to_thread(RABBITMQ.provide)
                self._rabbit = stack.enter_context(RabbitServer(program, self._folder / "rabbitmq"))
                vhost = stack.enter_context(self._rabbit.vhost())
                parts = urlsplit(self._rabbit.url(vhost))
                port = self._proxies.proxy("broker", self._rabbit.port)
                url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
            self.service = stack.enter_context(QueueingServer(self._folder / "service", url))
            stack.push_async_callback(self.dismiss)
            self.target = f"127.0.0.1:{self._proxies.proxy('service', self.service.port)}"
            self.stub = Stub(await stack.enter_async_context(channel(self.target)))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything."""
        await self._stack.__aexit__(kind, error, trace)

    async def employ(self, count: int, subscription: str, *more: str) -> None:
        """Start consumers, with further arguments for their program."""
        for number in range(count):
            file = self._folder / f"consumer-{number}.jsonl"
            consumer = ConsumerProcess(self.target, file, subscription, *more)
            self.consumers.append(consumer)
            await asyncio.to_thread(consumer.start)

    async def dismiss(self) -> None:
        """Stop all consumers."""
        for consumer in self.consumers:
            await asyncio.to_thread(consumer.kill)

    async def settle(self) -> None:
        """Let the broker write down which queues there are."""
        if self._rabbit is not None:
            await asyncio.to_thread(self._rabbit.settle)

    async def suffer(self, fault: Fault) -> None:
        """Break something, wait, and repair it."""
        victim: Any = {
            "broker": self._rabbit,
            "service": self.service,
            "consumer": self.consumers[fault.which] if self.consumers else None,
        }[fault.target]
        if fault.kind == RESET:
            await asyncio.to_thread(self._proxies.reset, fault.target)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(self._proxies.heal, fault.target)
        elif fault.kind == STOP:
            victim.pause()
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                victim.resume()
        elif fault.kind == KILL:
            await asyncio.to_thread(victim.kill)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(victim.start)
