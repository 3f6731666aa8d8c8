"""The processes of a whole Plexus, and what they share before they are forked."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from services.cli.supervisor.spec import ProcessSpec
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

SERVICES = ("vectors", "storage", "search", "inference", "queueing", "knowledge")
NAMES = ("control", *SERVICES, "edge")
"""All processes, in the order of `plexus status`."""
MAX_SCALE = 64
"""Instances of one service on one machine."""

_SHARED = (
    "grpc",
    "grpc.aio",
    "grpc_health.v1.health_pb2_grpc",
    "google.rpc.error_details_pb2",
    "pydantic",
    "yaml",
    "structlog",
    "opentelemetry.trace",
    "prometheus_client",
    "cryptography.x509",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "services.runtime.service",
)
_ALONE = frozenset({"queueing"})
"""Services with a large library that no other has: imported beside the start of the others, not before it."""
_MAINS = (
    "services.mesh.main",
    *(f"services.{name}.main" for name in SERVICES if name not in _ALONE),
    "services.gateway.main",
)
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def preload() -> list[str]:
    """Import what children share, and freeze it so that no collection touches (and so copies) its pages.

    A module that cannot be imported is left to the child that needs it: one broken service must not keep the
    others down.

    Returns:
        One line for each module that failed.
    """
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")  # a thread pool made by an import would not survive the fork
    gc.disable()
    failed = []
    for module in (*_SHARED, *_MAINS):
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - any import-time failure counts the same
            failed.append(f"cannot import {module}: {type(error).__name__}: {error}")
    gc.collect()
    gc.freeze()
    return failed


def collect_seldom() -> None:
    """Let the garbage collector run when much has been allocated, not at every 700 objects of a busy server.

    Calls and their messages are freed by reference counts; what the collector finds are the few cycles of
    asyncio. At its own thresholds it takes a quarter of the control plane's time under a burst of changes.
    """
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


def thread_count() -> int:
    """Threads of this process, native ones included; 1 where the system does not tell."""
    if sys.platform != "linux":
        return 1
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only the number matters


def scale(texts: Sequence[str]) -> dict[str, int]:
    """Read `SERVICE=COUNT` texts.

    Raises:
        InvalidArgumentError: One is malformed, or the service cannot run more than once.
    """
    counts: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in SERVICES:
            raise InvalidArgumentError(f"--scale {text}: no such service; there are: {', '.join(SERVICES)}")
        if not number.isdecimal() or not 1 <= int(number) <= MAX_SCALE:
            raise InvalidArgumentError(
                f"--scale {text}: needs a count, as in {name}=3, from 1 to {MAX_SCALE}"
            )
        counts[name] = int(number)
        main = importlib.import_module(f"services.{name}.main")
        if counts[name] > 1 and not main.SERVICE.stateless:
            raise InvalidArgumentError(
                f"--scale {text}: {name} keeps its data in an embedded engine, which has one owner: "
                "one instance is all there can be on a state folder"
            )
    return counts


def specs(
    state_dir: Path, http_port: int, control_port: int, counts: Mapping[str, int] | None = None
) -> list[ProcessSpec]:
    """Control plane, services, edge: started in this order, stopped from the outside in.

    Args:
        state_dir: The state folder.
        http_port: Where the edge listens.
        control_port: Where the control plane listens.
        counts: Instances of services that have more than one.
    """

    async def control(ready: Callable[[], None], stop: asyncio.Event) -> None:
        main = importlib.import_module("services.mesh.main")
        await main.serve(state_dir, control_port, ready, stop)

    async def edge(ready: Callable[[], None], stop: asyncio.Event) -> None:
        main = importlib.import_module("services.gateway.main")
        await main.serve(state_dir, http_port, control_port, ready, stop)

    def service(name: str, number: int) -> Callable[[Callable[[], None], asyncio.Event], Any]:
        async def run(ready: Callable[[], None], stop: asyncio.Event) -> None:
            runtime = importlib.import_module("services.runtime.service")
            main = importlib.import_module(f"services.{name}.main")
            await runtime.serve(
                main.SERVICE,
                state_dir=state_dir,
                control_port=control_port,
                ready=ready,
                stop=stop,
                number=number,
            )

        return run

    return [
        ProcessSpec("control", control, 0, 3, f"127.0.0.1:{control_port}"),
        *(
            ProcessSpec(
                name if number == 1 else f"{name}-{number}",
                service(name, number),
                1,
                1 if name == "knowledge" else 2,
            )
            for name in SERVICES
            for number in range(1, (counts or {}).get(name, 1) + 1)
        ),
        ProcessSpec("edge", edge, 1, 0, f"127.0.0.1:{http_port}"),
    ]
