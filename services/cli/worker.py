"""`plexus worker`: the tasks of an app, run until a signal ends it in order."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from plexus.client.failures import problem
from plexus.client.join import NotJoinedError, connect
from plexus.client.tasks import TaskApp
from plexus.client.worker import Worker
from plexus.queueing.v1 import queueing_pb2_grpc
from services.runtime.errors import InvalidArgumentError, NotFoundError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def find_app(target: str) -> TaskApp:
    """The app that `module:name` names; the current folder is searched first.

    Raises:
        InvalidArgumentError: It is not of this form, or names no TaskApp.
        NotFoundError: There is no such module or name in it.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise InvalidArgumentError(f"{target!r} is not MODULE:APP, such as shop:app")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise NotFoundError(f"no module {error.name!r}, from {Path.cwd()}") from error
    try:
        app = getattr(module, name)
    except AttributeError as error:
        raise NotFoundError(f"module {module_name!r} has no {name!r}") from error
    if not isinstance(app, TaskApp):
        raise InvalidArgumentError(f"{target} is a {type(app).__name__}, no plexus.client.TaskApp")
    if not app.tasks:
        raise InvalidArgumentError(f"{target} has no tasks")
    return app


def run(
    state: Path,
    target: str,
    *,
    queues: Sequence[str],
    concurrency: int,
    drain_s: float,
    per_second: float,
    ready: Callable[[TaskApp, Worker], None],
) -> None:
    """Run an app's tasks; SIGTERM and Ctrl-C drain, a second one ends at once.

    Args:
        state: State folder of the Plexus to work for.
        target: `module:app`.
        queues: Of these only; empty is all of the app's.
        concurrency: Tasks of a queue that run at once.
        drain_s: How long running tasks may go on when it is to end.
        per_second: Tasks of a queue that are begun in a second; 0 is no bound.
        ready: Called when it begins.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    app = find_app(target)

    async def work() -> None:
        async with connect(state) as mesh:
            stub = mesh.stub(queueing_pb2_grpc.QueueingServiceStub)
            try:
                worker = Worker(
                    app,
                    stub,
                    queues=tuple(queues),
                    concurrency=concurrency,
                    drain_s=drain_s,
                    per_second=per_second,
                )
            except ValueError as error:
                raise InvalidArgumentError(str(error)) from error
            async with app.open(stub):  # tasks send tasks
                running = asyncio.create_task(worker.run())
                loop = asyncio.get_running_loop()

                def end() -> None:
                    for number in (signal.SIGTERM, signal.SIGINT):
                        loop.add_signal_handler(number, running.cancel)
                    worker.drain()

                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, end)
                ready(app, worker)
                await running

    try:
        asyncio.run(work())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except NotJoinedError as error:
        raise UnavailableError(str(error)) from error
    except grpc.RpcError as error:
        raise PlexusError(problem(error).message) from error
