"""The processes of a whole Plexus, and what they share before they are forked."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from services.cli.supervisor.spec import ProcessSpec

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

SERVICES = ("vectors", "storage", "search", "inference", "queueing", "knowledge")
NAMES = ("control", *SERVICES, "edge")
"""All processes, in the order of `plexus status`."""

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
_MAINS = ("services.mesh.main", *(f"services.{name}.main" for name in SERVICES), "services.gateway.main")
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


def thread_count() -> int:
    """Threads of this process, native ones included; 1 where the system does not tell."""
    if sys.platform != "linux":
        return 1
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only the number matters


def specs(state_dir: Path, http_port: int, control_port: int) -> list[ProcessSpec]:
    """Control plane, services, edge: started in this order, stopped from the outside in.

    Args:
        state_dir: The state folder.
        http_port: Where the edge listens.
        control_port: Where the control plane listens.
    """

    async def control(ready: Callable[[], None], stop: asyncio.Event) -> None:
        main = importlib.import_module("services.mesh.main")
        await main.serve(state_dir, control_port, ready, stop)

    async def edge(ready: Callable[[], None], stop: asyncio.Event) -> None:
        main = importlib.import_module("services.gateway.main")
        await main.serve(state_dir, http_port, control_port, ready, stop)

    def service(name: str) -> Callable[[Callable[[], None], asyncio.Event], Any]:
        async def run(ready: Callable[[], None], stop: asyncio.Event) -> None:
            runtime = importlib.import_module("services.runtime.service")
            main = importlib.import_module(f"services.{name}.main")
            await runtime.serve(
                main.SERVICE, state_dir=state_dir, control_port=control_port, ready=ready, stop=stop
            )

        return run

    return [
        ProcessSpec("control", control, 0, 3, f"127.0.0.1:{control_port}"),
        *(ProcessSpec(name, service(name), 1, 1 if name == "knowledge" else 2) for name in SERVICES),
        ProcessSpec("edge", edge, 1, 0, f"127.0.0.1:{http_port}"),
    ]
