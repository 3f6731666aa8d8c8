"""A program that uses tasks without an event loop, in its forks, before and after it has used them itself.

python -m tests.client.preforked PORT
"""

from __future__ import annotations

import os
import sys
from ast import literal_eval
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import plexus.client
from plexus.client import blocking
from plexus.queueing.v1 import queueing_pb2_grpc
from tests.servers import queueing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

app = plexus.client.TaskApp("doubling")
WAIT_S = 120.0


@app.task(keep_s=3600)
async def double(number: int) -> int:
    return 2 * number


def connect_to(port: int) -> None:
    """Have blocking calls go to a service on this machine."""

    @asynccontextmanager
    async def connecting() -> AsyncIterator[queueing_pb2_grpc.QueueingServiceStub]:
        async with queueing.channel(f"127.0.0.1:{port}") as channel:
            yield queueing_pb2_grpc.QueueingServiceStub(channel)

    blocking.connect_by(connecting)


def _forked(work: Callable[[], object]) -> str:
    """What a child says of its work."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = repr(work())
        except plexus.client.BlockingError as error:
            said = f"BlockingError: {error}"
        except BaseException as error:  # noqa: BLE001 - a child must not go on as its parent
            said = f"failed: {error!r}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def _main(port: int) -> None:
    connect_to(port)

    def ask(number: int) -> int:
        return double.blocking.delay(number).result(timeout_s=WAIT_S)

    said = [_forked(lambda: ask(1)), _forked(lambda: ask(2))]  # before the parent has asked
    asked = literal_eval(_forked(lambda: double.blocking.delay(7).call_id))
    said += [_forked(lambda: double.blocking.find(asked, timeout_s=WAIT_S))]
    said += [str(ask(3)), _forked(lambda: ask(4)), str(ask(5))]
    sys.stdout.write("\n".join(said))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
