"""The Python SDK of Plexus.

    import plexus.client
    from plexus.vectors.v1 import vectors_pb2, vectors_pb2_grpc

    async with plexus.client.connect() as mesh:
        vectors = mesh.stub(vectors_pb2_grpc.VectorsServiceStub)
        await vectors.ListCollections(vectors_pb2.ListCollectionsRequest())

Names are imported at first use: whoever needs the state folder alone does not load gRPC.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plexus.client.channel import Mesh, MeshChannel
    from plexus.client.failures import Problem, Violation, problem
    from plexus.client.join import NotJoinedError, connect
    from plexus.client.kept import ResultNotFoundError
    from plexus.client.portal import BlockingError
    from plexus.client.publisher import Publisher, PublishError
    from plexus.client.results import Handle, TaskFailedError
    from plexus.client.state import default_state_dir
    from plexus.client.subscriber import RejectError, RetryLaterError, Subscriber
    from plexus.client.tasks import Task, TaskApp
    from plexus.client.worker import TaskError, Worker, attempt, progress

# gRPC reads it when it is imported. Its handlers start threads in a fork of a process that makes calls in an
# event loop, and those crash the fork, whatever it does; without them it lives, as long as it calls nobody.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__all__ = [
    "BlockingError",
    "Handle",
    "Mesh",
    "MeshChannel",
    "NotJoinedError",
    "Problem",
    "PublishError",
    "Publisher",
    "RejectError",
    "ResultNotFoundError",
    "RetryLaterError",
    "Subscriber",
    "Task",
    "TaskApp",
    "TaskError",
    "TaskFailedError",
    "Violation",
    "Worker",
    "attempt",
    "connect",
    "default_state_dir",
    "problem",
    "progress",
]

_HOMES = {
    "BlockingError": "portal",
    "Handle": "results",
    "Mesh": "channel",
    "MeshChannel": "channel",
    "NotJoinedError": "join",
    "Problem": "failures",
    "PublishError": "publisher",
    "Publisher": "publisher",
    "RejectError": "subscriber",
    "ResultNotFoundError": "kept",
    "RetryLaterError": "subscriber",
    "Subscriber": "subscriber",
    "Task": "tasks",
    "TaskApp": "tasks",
    "TaskError": "worker",
    "TaskFailedError": "results",
    "Violation": "failures",
    "Worker": "worker",
    "attempt": "worker",
    "connect": "join",
    "default_state_dir": "state",
    "problem": "failures",
    "progress": "worker",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
