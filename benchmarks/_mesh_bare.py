"""The bare ends of a path: a grpc.aio server that echoes 1 KB, and the caller that every path is driven by.

Nothing but gRPC is imported here, so that the memory and time of these processes are those of gRPC alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import BytesValue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

SERVICE = "bench.Echo"
METHOD = "Ask"
PATH = f"/{SERVICE}/{METHOD}"
PAYLOAD = bytes(range(256)) * 4
CALL_S = 5.0
READY_S = 60.0
BETWEEN_S = 0.002
"""Pause between calls that look for a change."""


def say(**message: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps(message), flush=True)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def _echo(request: BytesValue, _context: Any) -> BytesValue:
    return request


def add_to(server: grpc.aio.Server) -> None:
    """Serve the echo."""
    handler: Any = grpc.unary_unary_rpc_method_handler(
        _echo, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


def method(channel: Any) -> Callable[..., Awaitable[BytesValue]]:
    """The echo, to be called."""
    call: Callable[..., Awaitable[BytesValue]] = channel.unary_unary(
        PATH, request_serializer=BytesValue.SerializeToString, response_deserializer=BytesValue.FromString
    )
    return call


class Caller:
    """Calls at a fixed rate, whatever comes back."""

    def __init__(
        self, call: Callable[..., Awaitable[BytesValue]], metadata: list[tuple[str, str]] | None = None
    ) -> None:
        self._call = call
        self._metadata = metadata
        self._request = BytesValue(value=PAYLOAD)
        self._late: list[float] = []
        self._latencies: list[float] = []
        self._failures: dict[str, int] = {}

    async def ready(self) -> str:
        """Call until one is answered; what the last failure was."""
        deadline = asyncio.get_running_loop().time() + READY_S
        while asyncio.get_running_loop().time() < deadline:
            self._failures = {}
            await self._one(asyncio.get_running_loop().time())
            if not self._failures:
                return ""
            await asyncio.sleep(0.1)
        return next(iter(self._failures))

    async def until(self, *, denied: bool) -> float:
        """Call, one after the other, until the answer is a refusal, or no longer one.

        Returns:
            `time.monotonic()` of that answer, which all processes of a machine share.
        """
        async with asyncio.timeout(READY_S):
            while True:
                self._failures = {}
                await self._one(0)
                if any(text.startswith("PERMISSION_DENIED") for text in self._failures) == denied:
                    return time.monotonic()
                await asyncio.sleep(BETWEEN_S)

    async def run(self, rate: float, seconds: float) -> dict[str, Any]:
        """Send at the times that the rate gives.

        A latency counts from when the call was to be sent: a caller or a path that falls behind shows it in
        every call that waited.

        Returns:
            Seconds of each call that was answered, seconds each was sent late, and failures by text.
        """
        clock = asyncio.get_running_loop().time
        self._late, self._latencies, self._failures = [], [], {}
        began = clock()
        calls = set()
        for number in range(int(rate * seconds)):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - clock()))
            call = asyncio.create_task(self._one(due))
            calls.add(call)
            call.add_done_callback(calls.discard)
        await asyncio.gather(*calls)
        return {"latencies": self._latencies, "late": self._late, "failures": self._failures}

    async def _one(self, due: float) -> None:
        clock = asyncio.get_running_loop().time
        self._late.append(clock() - due)
        try:
            answer = await self._call(self._request, timeout=CALL_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            text = f"{error.code().name}: {(error.details() or '')[:120]}"
            self._failures[text] = self._failures.get(text, 0) + 1
            return
        self._latencies.append(clock() - due)
        assert len(answer.value) == len(PAYLOAD)


async def answer(caller: Caller) -> None:
    """Do what standard input says, a JSON line a command, and answer with a line each."""
    say(ready=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        ((command, options),) = json.loads(line).items()
        say(answer=await getattr(caller, command)(**options))


def run_exactly(work: Coroutine[Any, Any, None]) -> None:
    """Run on a loop with timers exact to the microsecond: epoll, the usual one, waits whole milliseconds."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(work)


async def _serve() -> None:
    server = grpc.aio.server()
    add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(ready=True, port=port)
    await stop_event().wait()
    await server.stop(1)


async def _call(port: int, metadata: list[str]) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        pairs = [(name, value) for name, _, value in (each.partition("=") for each in metadata)]
        await answer(Caller(method(channel), pairs or None))


def main() -> None:
    """Be one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--call", type=int, help="port; without it: serve")
    parser.add_argument("--metadata", nargs="*", default=[], help="name=value, sent with each call")
    options = parser.parse_args()
    if options.call:
        run_exactly(_call(options.call, options.metadata))
    else:
        asyncio.run(_serve())


if __name__ == "__main__":
    main()
